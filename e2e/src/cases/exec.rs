//! ExecSync: output, exit codes, timeouts that kill whole process trees, concurrency; ContainerStats and the metrics
//! page.

use crate::case;
use crate::client::answer;
use crate::failure::Result;
use crate::pod::{Pod, container_spec};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use std::time::{Duration, Instant};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(returns_output_and_exit_code, 60),
        case!(returns_large_output, 60),
        case!(timeout_kills_the_process_tree, 60),
        case!(many_execs_run_at_once, 90),
        case!(is_refused_unless_the_container_runs, 60),
        case!(has_the_identity_of_the_container, 60),
        case!(container_and_pod_stats_are_reported, 60),
        case!(metrics_page_is_served, 60),
    ]
}

async fn returns_output_and_exit_code(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let response = c
        .exec(&["sh", "-c", "echo out; echo err >&2; exit 42"])
        .await?;
    same!(
        (
            response.stdout.as_slice(),
            response.stderr.as_slice(),
            response.exit_code
        ),
        (b"out\n".as_slice(), b"err\n".as_slice(), 42),
        "exec"
    );
    same!(
        c.exec(&["sh", "-c", "kill -KILL $$"]).await?.exit_code,
        137,
        "death by signal"
    );
    same!(
        c.out(&["cat", "/proc/1/comm"]).await?,
        "sleep\n",
        "PID 1 of the container"
    );
    let missing = c.exec_raw(&["/no/such/program"], 0).await;
    let said = match &missing {
        Ok(response) => String::from_utf8_lossy(&response.get_ref().stderr).into_owned(),
        Err(status) => status.message().to_owned(),
    };
    ensure!(
        said.contains("/no/such/program"),
        "a missing program is not named: {missing:?}"
    );
    pod.end().await
}

async fn returns_large_output(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let response = c
        .exec(&[
            "sh",
            "-c",
            "head -c 3000000 /dev/zero; head -c 1000000 /dev/zero >&2",
        ])
        .await?;
    same!(
        (response.stdout.len(), response.stderr.len()),
        (3_000_000, 1_000_000),
        "bytes"
    );
    // The kubelet accepts 16 MiB of both streams; output beyond that must not use the daemon's memory.
    let endless = c
        .exec_raw(&["sh", "-c", "head -c 24000000 /dev/zero"], 60)
        .await;
    if let Ok(response) = endless {
        ensure!(
            response.get_ref().stdout.len() <= 16 << 20,
            "{} bytes of output",
            response.get_ref().stdout.len()
        );
    }
    c.out(&["true"]).await?;
    pod.end().await
}

async fn timeout_kills_the_process_tree(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let tree = "sleep 4321 & (sleep 4321 & setsid sleep 4321) & sleep 4321; true";
    let start = Instant::now();
    let status = match c.exec_raw(&["sh", "-c", tree], 2).await {
        Ok(response) => crate::bail!("expected an error, got {response:?}"),
        Err(status) => status,
    };
    same!(
        status.code(),
        tonic::Code::DeadlineExceeded,
        "code of {status:?}"
    );
    ensure!(
        start.elapsed() >= Duration::from_secs(2),
        "gave up after {:?}",
        start.elapsed()
    );
    ensure!(
        start.elapsed() < ctx.patience(6),
        "gave up only after {:?}",
        start.elapsed()
    );
    poll::until(
        "all processes of the tree have ended",
        ctx.patience(5),
        || async {
            let left = c
                .out(&["sh", "-c", "ps | grep '[s]leep 4321' | wc -l"])
                .await?;
            ensure!(left.trim() == "0", "{} left", left.trim());
            Ok(())
        },
    )
    .await?;
    same!(
        c.status().await?.state(),
        ContainerState::ContainerRunning,
        "the container"
    );
    pod.end().await
}

async fn many_execs_run_at_once(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let all = (0..20).map(|i| {
        let c = c.clone();
        async move {
            let text = c
                .out(&[
                    "sh",
                    "-c",
                    &format!("usleep {}; echo {i}", (20 - i) * 10_000),
                ])
                .await?;
            same!(text.trim(), i.to_string(), "output of exec {i}");
            Ok::<_, crate::failure::Failure>(())
        }
    });
    futures::future::try_join_all(all).await?;
    pod.end().await
}

async fn is_refused_unless_the_container_runs(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let c = pod.start("c", &ctx.images.base, &["true"]).await?;
    c.exited(ctx.patience(20)).await?;
    let status = c.exec_raw(&["true"], 0).await;
    ensure!(
        status
            .as_ref()
            .is_err_and(|s| s.code() != tonic::Code::Internal),
        "exec in an exited container: {status:?}"
    );
    let mut ghost = c.clone();
    ghost.id = "f".repeat(64);
    let status = ghost.exec_raw(&["true"], 0).await;
    ensure!(
        status
            .as_ref()
            .is_err_and(|s| s.code() == tonic::Code::NotFound),
        "exec in an unknown container: {status:?}"
    );
    pod.end().await
}

async fn has_the_identity_of_the_container(ctx: Context) -> Result {
    let pod = ctx.shared_pod().await;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    config.working_dir = "/tmp".into();
    config.envs = vec![KeyValue {
        key: "GIVEN".into(),
        value: "by the pod".into(),
    }];
    if let Some(linux) = &mut config.linux {
        linux.security_context = Some(LinuxContainerSecurityContext {
            run_as_user: Some(Int64Value { value: 1000 }),
            ..Default::default()
        });
    }
    let c = pod.start_with(config).await?;
    let said = c
        .out(&[
            "sh",
            "-c",
            "id -u; pwd; echo $GIVEN; echo $FROM_IMAGE; hostname",
        ])
        .await?;
    same!(
        said,
        "1000\n/tmp\nby the pod\nbase\ncommon\n",
        "identity of an exec"
    );
    pod.end().await
}

async fn container_and_pod_stats_are_reported(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "stats").await?;
    let busy = pod
        .start(
            "busy",
            &ctx.images.base,
            &[
                "sh",
                "-c",
                "head -c 20000000 /dev/zero > /tmp/fill; while :; do :; done",
            ],
        )
        .await?;
    let idle = pod
        .start("idle", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let cpu = |s: &ContainerStats| {
        s.cpu
            .unwrap_or_default()
            .usage_core_nano_seconds
            .unwrap_or_default()
            .value
    };
    let first = cpu(&busy.stats().await?);
    let stats = poll::until("CPU time grows by 200 ms", ctx.patience(20), || async {
        let stats = busy.stats().await?;
        ensure!(
            cpu(&stats) > first + 200_000_000,
            "{} after {first}",
            cpu(&stats)
        );
        Ok(stats)
    })
    .await?;
    let memory = stats.memory.unwrap_or_default();
    let used = memory.working_set_bytes.unwrap_or_default().value;
    ensure!((1..300 << 20).contains(&used), "working set {used}");
    let written = poll::until(
        "the writable layer shows 20 MB",
        ctx.patience(20),
        || async {
            let layer = busy.stats().await?.writable_layer.unwrap_or_default();
            let bytes = layer.used_bytes.unwrap_or_default().value;
            ensure!(bytes >= 20_000_000, "{bytes}");
            Ok(bytes)
        },
    )
    .await?;
    ensure!(written < 200_000_000, "writable layer {written}");
    ensure!(
        cpu(&idle.stats().await?) < cpu(&stats),
        "an idle container used more CPU than a busy one"
    );
    let list = answer(
        "ListContainerStats",
        ctx.node
            .cri
            .runtime()
            .list_container_stats(ListContainerStatsRequest::default())
            .await,
    )?;
    same!(list.stats.len(), 2, "containers in ListContainerStats");
    let one = ListContainerStatsRequest {
        filter: Some(ContainerStatsFilter {
            id: idle.id.clone(),
            ..Default::default()
        }),
    };
    let list = answer(
        "ListContainerStats",
        ctx.node.cri.runtime().list_container_stats(one).await,
    )?;
    same!(
        list.stats
            .iter()
            .filter_map(|s| s.attributes.clone())
            .map(|a| a.id)
            .collect::<Vec<_>>(),
        std::slice::from_ref(&idle.id),
        "filtered"
    );
    pod.end().await
}

async fn metrics_page_is_served(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "metrics").await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let sum = |page: &str, name: &str| -> f64 {
        let lines = page
            .lines()
            .filter(|l| l.starts_with(name) && !l.starts_with('#'));
        lines
            .filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    };
    let before = ctx.node.metrics_page().await?;
    c.out(&["echo", "one"]).await?;
    c.out(&["echo", "two"]).await?;
    let page = ctx.node.metrics_page().await?;
    for name in ["boxes_created", "boxes_destroyed", "bytes_transferred"] {
        let name = format!("boxlite_{name}_total");
        ensure!(
            page.lines().any(|l| l.starts_with(&name)),
            "{name} is not on the page:\n{page}"
        );
    }
    let grown = |name: &str| sum(&page, name) - sum(&before, name);
    same!(grown("boxlite_exec_calls_total"), 2.0, "execs counted");
    ensure!(
        grown("boxlite_bytes_transferred_total") >= 8.0,
        "bytes of two echos"
    );
    let labels = format!(
        "pod=\"{}\"",
        pod.config.metadata.clone().unwrap_or_default().name
    );
    for name in [
        "cpu",
        "memory",
        "exec",
        "network_sent",
        "network_received",
        "start_stage",
    ] {
        let name = format!("boxlite_box_{name}");
        let labelled = |l: &&str| l.starts_with(&name) && l.contains(&labels) && l.contains("uid=");
        ensure!(
            page.lines().any(|l| labelled(&l)),
            "{name} has no line with the pod's labels:\n{page}"
        );
    }
    pod.end().await
}
