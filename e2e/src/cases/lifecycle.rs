//! Sandboxes and containers from run to removal: states, lists and filters, idempotence, retries that join.

use crate::case;
use crate::client::{answer, within};
use crate::failure::Result;
use crate::pod::{LONG_TIMEOUT, Pod, container_spec, pod_spec};
use crate::runner::{Case, Context};
use crate::{ensure, same};
use k8s_cri::v1::*;
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(version_and_status_are_reported, 20),
        case!(pod_runs_and_is_removed, 60),
        case!(container_states_and_exit_code_are_reported, 60),
        case!(exit_time_does_not_follow_the_guests_clock, 60),
        case!(lists_honor_filters, 90),
        case!(stop_and_remove_are_idempotent, 60),
        case!(retried_run_joins_the_one_in_flight, 60),
        case!(second_pod_of_a_name_is_refused, 60),
        case!(lists_answer_while_a_vm_boots, 60),
        case!(container_restarts_beside_a_running_neighbor, 60),
        case!(stop_honors_grace_period_and_signals, 90),
    ]
}

async fn version_and_status_are_reported(ctx: Context) -> Result {
    let mut client = ctx.node.cri.runtime();
    let version = answer("Version", client.version(VersionRequest::default()).await)?;
    same!(version.runtime_api_version, "v1", "API version");
    same!(version.runtime_name, "boxlite-cri", "runtime name");
    let status = answer(
        "Status",
        client.status(StatusRequest { verbose: true }).await,
    )?;
    for wanted in ["RuntimeReady", "NetworkReady"] {
        let conditions = status.status.clone().unwrap_or_default().conditions;
        let condition = conditions.iter().find(|c| c.r#type == wanted);
        ensure!(
            condition.is_some_and(|c| c.status),
            "{wanted}: {condition:?}"
        );
    }
    let config = answer(
        "RuntimeConfig",
        client.runtime_config(RuntimeConfigRequest {}).await,
    )?;
    ensure!(config.linux.is_some(), "RuntimeConfig has no linux part");
    Ok(())
}

async fn pod_runs_and_is_removed(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "life").await?;
    let status = pod.status().await?;
    same!(status.state(), PodSandboxState::SandboxReady, "state");
    same!(status.metadata, pod.config.metadata, "metadata");
    same!(status.labels, pod.config.labels, "labels");
    let age = now() - status.created_at;
    ensure!(
        (0..120_000_000_000).contains(&age),
        "created_at is {age} ns ago"
    );
    ensure!(
        pod.ip().await?.starts_with("10.88."),
        "address {:?}",
        pod.ip().await?
    );
    pod.stop().await?;
    same!(
        pod.status().await?.state(),
        PodSandboxState::SandboxNotready,
        "state after Stop"
    );
    pod.remove().await?;
    let gone = pod.status_verbose(false).await;
    ensure!(
        gone.as_ref().is_err_and(|e| e.0.contains("NotFound")),
        "status of a removed pod: {gone:?}"
    );
    Ok(())
}

async fn container_states_and_exit_code_are_reported(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "states").await?;
    let container = pod
        .create("c", &ctx.images.base, &["sh", "-c", "echo hi; exit 7"])
        .await?;
    same!(
        container.status().await?.state(),
        ContainerState::ContainerCreated,
        "after Create"
    );
    let before = now();
    container.start().await?;
    let status = container.exited(ctx.patience(20)).await?;
    same!(status.exit_code, 7, "exit code");
    same!(status.reason, "Error", "reason");
    ensure!(
        status.started_at >= before - 2_000_000_000,
        "started_at {} before {before}",
        status.started_at
    );
    ensure!(
        status.finished_at >= status.started_at,
        "finished {} before started {}",
        status.finished_at,
        status.started_at
    );
    same!(
        status.log_path,
        container.log().display().to_string(),
        "log path"
    );
    same!(
        status.image_ref.contains("sha256:"),
        true,
        "image_ref {:?}",
        status.image_ref
    );
    let good = pod
        .start("good", &ctx.images.base, &["true"])
        .await?
        .exited(ctx.patience(20))
        .await?;
    same!(
        (good.exit_code, good.reason.as_str()),
        (0, "Completed"),
        "a success"
    );
    let again = container.start().await;
    ensure!(again.is_err(), "an exited container can't be started again");
    pod.end().await
}

/// A container sets the VM's clock back by years. Its exit is after the request to stop it all the same.
async fn exit_time_does_not_follow_the_guests_clock(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "clock").await?;
    let script =
        "trap 'exit 0' TERM; date -s @1000000000 >/dev/null && echo set; sleep infinity & wait";
    let mut config = container_spec("c", &ctx.images.base, &["sh", "-c", script]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().capabilities = Some(Capability {
        add_capabilities: vec!["SYS_TIME".into()],
        ..Default::default()
    });
    let container = pod.create_with(config).await?;
    container.start().await?;
    container.printed("set", ctx.patience(20)).await?;
    let requested = now();
    container.stop(20).await?;
    let status = container.status().await?;
    same!(status.exit_code, 0, "exit code");
    ensure!(
        (requested..=now()).contains(&status.finished_at),
        "finished_at {} is not between the request at {requested} and now",
        status.finished_at
    );
    Ok(())
}

async fn lists_honor_filters(ctx: Context) -> Result {
    let one = Pod::run(&ctx.node, "one").await?;
    let two = Pod::run(&ctx.node, "two").await?;
    let a = one.start("a", &ctx.images.base, &["sleep", "1000"]).await?;
    let b = two
        .create("b", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let mut filter = PodSandboxFilter {
        label_selector: one.config.labels.clone(),
        ..Default::default()
    };
    same!(
        ctx.pods(filter).await?,
        std::slice::from_ref(&one.id),
        "by label"
    );
    filter = PodSandboxFilter {
        id: two.id[..13].into(),
        ..Default::default()
    };
    same!(
        ctx.pods(filter).await?,
        std::slice::from_ref(&two.id),
        "by prefix"
    );
    two.stop().await?;
    filter = PodSandboxFilter::default();
    filter.state = Some(PodSandboxStateValue {
        state: PodSandboxState::SandboxReady.into(),
    });
    same!(
        ctx.pods(filter).await?,
        std::slice::from_ref(&one.id),
        "ready ones"
    );
    let mut filter = ContainerFilter {
        pod_sandbox_id: two.id.clone(),
        ..Default::default()
    };
    same!(containers(&ctx, filter).await?, [b.id], "of a pod");
    filter = ContainerFilter::default();
    filter.state = Some(ContainerStateValue {
        state: ContainerState::ContainerRunning.into(),
    });
    same!(containers(&ctx, filter).await?, [a.id], "running ones");
    filter = ContainerFilter {
        id: "feedbeef".into(),
        ..Default::default()
    };
    same!(containers(&ctx, filter).await?.len(), 0, "unknown id");
    one.end().await?;
    two.end().await
}

/// Returns the ids of the containers that match the filter.
async fn containers(ctx: &Context, filter: ContainerFilter) -> Result<Vec<String>> {
    let filter = Some(filter);
    let request = ListContainersRequest { filter };
    let list = ctx.node.cri.runtime().list_containers(request).await?;
    let list = list.into_inner().containers;
    Ok(list.into_iter().map(|c| c.id).collect())
}

async fn stop_and_remove_are_idempotent(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "twice").await?;
    let container = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    for _ in 0..2 {
        container.stop(0).await?;
    }
    same!(
        container.status().await?.exit_code,
        137,
        "exit code after SIGKILL"
    );
    for _ in 0..2 {
        container.remove().await?;
    }
    container.stop(0).await?;
    for _ in 0..2 {
        pod.stop().await?;
    }
    for _ in 0..2 {
        pod.remove().await?;
    }
    pod.stop().await
}

async fn retried_run_joins_the_one_in_flight(ctx: Context) -> Result {
    let config = pod_spec(&ctx.node, "retry");
    let request = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: String::new(),
    };
    // The first call exceeds its deadline; the second one arrives while the VM boots.
    let impatient = ctx
        .node
        .cri
        .runtime()
        .run_pod_sandbox(within(Duration::from_millis(150), request.clone()))
        .await;
    ensure!(
        impatient.is_err(),
        "a VM in 150 ms: this test needs a shorter deadline"
    );
    let pod = Pod::run_with(&ctx.node, config.clone()).await?;
    // A pod that runs is not a retry: a second pod of its name is refused by name.
    let again = Pod::run_with(&ctx.node, config).await.map(|p| p.id);
    let named = again
        .as_ref()
        .is_err_and(|e| e.0.contains("AlreadyExists") && e.0.contains("retry"));
    ensure!(named, "a second pod of one name: {again:?}");
    let list = ctx.pods(PodSandboxFilter::default()).await?;
    same!(list.len(), 1, "pods after three calls for one");
    pod.end().await
}

async fn second_pod_of_a_name_is_refused(ctx: Context) -> Result {
    let config = pod_spec(&ctx.node, "name");
    let (one, two) = tokio::join!(
        Pod::run_with(&ctx.node, config.clone()),
        Pod::run_with(&ctx.node, config.clone())
    );
    let first = one?;
    same!(first.id, two?.id, "two callers at once get one pod");
    let mut next = config.clone();
    if let Some(metadata) = &mut next.metadata {
        metadata.attempt += 1;
    }
    let second = Pod::run_with(&ctx.node, next).await?;
    ensure!(first.id != second.id, "another attempt is another pod");
    let image = &ctx.images.base;
    let a = first.create("same", image, &["true"]).await?;
    let b = first.create("same", image, &["true"]).await;
    let known = b
        .as_ref()
        .map_or_else(|e| e.0.contains("same"), |b| b.id == a.id);
    ensure!(known, "second container of one name: {:?}", b.map(|b| b.id));
    first.end().await?;
    second.end().await
}

async fn lists_answer_while_a_vm_boots(ctx: Context) -> Result {
    let boot = tokio::spawn({
        let node = ctx.node.clone();
        async move { Pod::run(&node, "slow").await }
    });
    let mut looks = 0;
    while !boot.is_finished() {
        let start = Instant::now();
        let mut client = ctx.node.cri.runtime();
        client
            .list_pod_sandbox(ListPodSandboxRequest::default())
            .await?;
        client
            .list_containers(ListContainersRequest::default())
            .await?;
        client
            .list_pod_sandbox_stats(ListPodSandboxStatsRequest::default())
            .await
            .ok();
        ensure!(
            start.elapsed() < ctx.patience(1),
            "lists took {:?} while a VM booted",
            start.elapsed()
        );
        looks += 1;
    }
    ensure!(looks > 3, "only {looks} looks during a boot");
    boot.await??.end().await
}

async fn container_restarts_beside_a_running_neighbor(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "restart").await?;
    let neighbor = pod
        .start("stays", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let pid_before = neighbor.status().await?.started_at;
    for attempt in 0..3 {
        let mut config =
            container_spec("again", &ctx.images.base, &["sh", "-c", "echo run; exit 3"]);
        if let Some(metadata) = &mut config.metadata {
            metadata.attempt = attempt;
        }
        config.log_path = format!("again/{attempt}.log");
        let container = pod.start_with(config).await?;
        same!(
            container.exited(ctx.patience(20)).await?.exit_code,
            3,
            "attempt {attempt}"
        );
        same!(container.output()?, "run\n", "output of attempt {attempt}");
        container.remove().await?;
    }
    let status = neighbor.status().await?;
    same!(
        (status.state(), status.started_at),
        (ContainerState::ContainerRunning, pid_before),
        "the neighbor"
    );
    pod.end().await
}

async fn stop_honors_grace_period_and_signals(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "signals").await?;
    let trap = "trap 'echo got TERM; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let polite = pod
        .start("polite", &ctx.images.base, &["sh", "-c", trap])
        .await?;
    polite.printed("ready", ctx.patience(20)).await?;
    polite.stop(20).await?;
    same!(
        polite.status().await?.exit_code,
        5,
        "exit code of the TERM handler"
    );
    let deaf = pod
        .start(
            "deaf",
            &ctx.images.base,
            &[
                "sh",
                "-c",
                "trap '' TERM; echo ready; while :; do sleep 0.1; done",
            ],
        )
        .await?;
    deaf.printed("ready", ctx.patience(20)).await?;
    let start = Instant::now();
    deaf.stop(2).await?;
    ensure!(
        start.elapsed() >= Duration::from_secs(2),
        "killed before its grace ended: {:?}",
        start.elapsed()
    );
    same!(
        deaf.status().await?.exit_code,
        137,
        "exit code after SIGKILL"
    );
    let request = PullImageRequest {
        image: Some(ImageSpec {
            image: ctx.images.user.clone(),
            ..Default::default()
        }),
        ..Default::default()
    };
    answer(
        "PullImage",
        ctx.node
            .cri
            .image()
            .pull_image(within(LONG_TIMEOUT, request))
            .await,
    )?;
    let quits = "trap 'echo QUIT; exit 6' QUIT; echo ready; while :; do sleep 0.1; done";
    let own = pod
        .start("own", &ctx.images.user, &["sh", "-c", quits])
        .await?;
    own.printed("ready", ctx.patience(20)).await?;
    own.stop(20).await?;
    same!(
        own.status().await?.exit_code,
        6,
        "the image's StopSignal SIGQUIT"
    );
    pod.end().await
}

fn now() -> i64 {
    let since = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
