//! Crashes: kill -9 of the daemon at random moments loses nothing; kill -9 of a shim or a VMM is noticed within 2 s and
//! leaves nothing after removal. Each case has a dedicated node.

use crate::case;
use crate::context::{Backend, kills};
use crate::failure::Result;
use crate::leak::LeakSnapshot;
use crate::logs;
use crate::node::Node;
use crate::pod::{Pod, pod_spec, pull};
use crate::process::{family, kill, vmm};
use crate::runner::{Case, Context};
use crate::stream::{Session, Streams, Transport};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rand::Rng;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time limit of each turn of `make kills`; a turn takes about 3 s on an idle machine.
const SECONDS_PER_KILL: u64 = 30;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(killed_daemon_loses_no_log_lines, 120),
        case!(exits_during_downtime_are_reported, 120),
        case!(
            killed_daemon_at_random_moments_of_a_start,
            300.max(SECONDS_PER_KILL * kills().unwrap_or(0) as u64)
        ),
        case!(killed_daemon_during_a_pull_recovers, 120),
        case!(terminated_daemon_keeps_its_pods, 90),
        case!(pod_whose_records_are_lost_is_adopted, 90),
        case!(killed_shim_is_noticed_and_cleaned_up, 120),
        case!(killed_vmm_is_noticed_and_cleaned_up, 120),
        case!(killed_vmm_ends_calls_into_it, 90),
        case!(killed_helpers_are_noticed_and_cleaned_up, 120)
            .not_on(Backend::Krun, "libkrun has no helper processes"),
        case!(pods_removed_during_downtime_are_forgotten, 120),
        case!(silent_guest_is_stopped_in_time, 120),
    ]
}

async fn node(ctx: &Context, name: &str) -> Result<Arc<Node>> {
    let node = ctx.dedicated_node(name, |_| {}).await?;
    pull(&node, &ctx.images.base).await?;
    Ok(node)
}

async fn killed_daemon_loses_no_log_lines(ctx: Context) -> Result {
    let node = node(&ctx, "dlog").await?;
    let pod = Pod::run(&node, "logs").await?;
    let (turns, lines) = (ctx.rounds(3, 2), ctx.rounds(500, 300));
    let script = format!(
        "i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); usleep 10000; done; exit 17"
    );
    let c = pod
        .start("c", &ctx.images.base, &["sh", "-c", &script])
        .await?;
    for turn in 0..turns {
        let seen = logs::read(&c.log())?.len();
        poll::until("more lines", ctx.patience(20), || async {
            let n = logs::read(&c.log())?.len();
            ensure!(n > seen + 30, "{n} lines after {seen}, turn {turn}");
            Ok(())
        })
        .await?;
        node.kill().await?;
        let dead = logs::read(&c.log())?.len();
        poll::until("lines while no daemon runs", ctx.patience(20), || async {
            let n = logs::read(&c.log())?.len();
            ensure!(n > dead + 10, "{n} lines after {dead}");
            Ok(())
        })
        .await?;
        node.serve().await?;
        same!(
            pod.status().await?.state(),
            PodSandboxState::SandboxReady,
            "the pod, turn {turn}"
        );
        same!(
            c.out(&["echo", "exec"]).await?,
            "exec\n",
            "ExecSync, turn {turn}"
        );
    }
    same!(c.exited(ctx.patience(60)).await?.exit_code, 17, "exit code");
    let wanted: String = (0..lines).map(|i| format!("line {i}\n")).collect();
    ensure!(
        logs::stream(&logs::read(&c.log())?, "stdout") == wanted.as_bytes(),
        "the log has a gap or a line twice"
    );
    pod.end().await
}

async fn exits_during_downtime_are_reported(ctx: Context) -> Result {
    let node = node(&ctx, "dend").await?;
    let pod = Pod::run(&node, "ends").await?;
    let flag = node.dir.join("go");
    let config = super::exits_on_signal_file(&ctx.images.base, &flag, 23)?;
    let c = pod.start_with(config).await?;
    let stays = pod
        .start("stays", &ctx.images.base, &["sleep", "1000"])
        .await?;
    let created = pod
        .create("created", &ctx.images.base, &["sh", "-c", "exit 4"])
        .await?;
    let before = (pod.status().await?, stays.status().await?);
    node.kill().await?;
    std::fs::write(flag.join("now"), "")?;
    c.printed("bye", ctx.patience(20)).await?;
    node.serve().await?;
    same!(
        c.exited(ctx.patience(5)).await?.exit_code,
        23,
        "exit code of a container that ended during downtime"
    );
    let after = (pod.status().await?, stays.status().await?);
    same!(
        (after.0.created_at, after.0.network, after.0.metadata),
        (before.0.created_at, before.0.network, before.0.metadata),
        "the pod"
    );
    same!(
        (after.1.state(), after.1.started_at, after.1.metadata),
        (before.1.state(), before.1.started_at, before.1.metadata),
        "the neighbor"
    );
    created.start().await?;
    same!(
        created.exited(ctx.patience(20)).await?.exit_code,
        4,
        "a container created before and started after the crash"
    );
    pod.end().await
}

async fn killed_daemon_at_random_moments_of_a_start(ctx: Context) -> Result {
    let node = node(&ctx, "drnd").await?;
    let clean = LeakSnapshot::take(&node)?;
    // Roughly the duration of run, create, start and exec on this backend.
    let span = ctx.patience(3).as_millis() as u64;
    for turn in 0..kills().unwrap_or_else(|| ctx.rounds(10, 4)) {
        let config = pod_spec(&node, &format!("r{turn}"));
        let work = tokio::spawn({
            let (node, config, image) = (node.clone(), config.clone(), ctx.images.base.clone());
            async move {
                let pod = Pod::run_with(&node, config).await?;
                let c = pod
                    .start("c", &image, &["sh", "-c", "echo started; sleep 1000"])
                    .await?;
                c.exec(&["true"]).await
            }
        });
        let delay = rand::rng().random_range(0..span);
        tokio::time::sleep(Duration::from_millis(delay)).await;
        node.kill().await?;
        drop(work.await);
        node.serve().await?;
        let pod = as_a_kubelet(&node, config)
            .await
            .map_err(|e| e.during(format!("turn {turn}, killed after {delay} ms")))?;
        for old in node.containers().await? {
            node.cri
                .runtime()
                .remove_container(RemoveContainerRequest {
                    container_id: old.id,
                })
                .await?;
        }
        same!(
            pod.sh(&ctx.images.base, "echo alive").await?,
            "alive\n",
            "turn {turn}, killed after {delay} ms"
        );
        pod.end().await?;
        clean
            .restored_by_another_daemon(&node, ctx.patience(10))
            .await
            .map_err(|e| e.during(format!("turn {turn}, killed after {delay} ms")))?;
    }
    Ok(())
}

/// Acts as a kubelet does on a pod that it may have started: uses the sandbox of that name if it is READY, otherwise
/// stops and removes it and runs the next attempt.
async fn as_a_kubelet(node: &Arc<Node>, mut config: PodSandboxConfig) -> Result<Pod> {
    for old in node.pods().await? {
        let pod = Pod {
            node: node.clone(),
            id: old.id.clone(),
            config: config.clone(),
        };
        if old.state() == PodSandboxState::SandboxReady {
            return Ok(pod);
        }
        pod.end().await?;
        if let Some(metadata) = &mut config.metadata {
            metadata.attempt += 1;
        }
    }
    Pod::run_with(node, config).await
}

async fn killed_daemon_during_a_pull_recovers(ctx: Context) -> Result {
    let node = node(&ctx, "dpull").await?;
    let image = super::images::bulky(&ctx.images, 3, 8 << 20)?;
    ctx.registry.push("killed", "1", &image).await?;
    for _ in 0..4 {
        let work = tokio::spawn({
            let node = node.clone();
            async move { pull(&node, "127.0.0.1:5000/killed:1").await }
        });
        let delay = rand::rng().random_range(20..400);
        tokio::time::sleep(Duration::from_millis(delay)).await;
        node.kill().await?;
        drop(work.await);
        node.serve().await?;
    }
    pull(&node, "127.0.0.1:5000/killed:1").await?;
    let pod = Pod::run(&node, "after").await?;
    same!(
        pod.sh("127.0.0.1:5000/killed:1", "ls /bulk | wc -l")
            .await?,
        "3\n",
        "files of the image"
    );
    pod.end().await
}

async fn terminated_daemon_keeps_its_pods(ctx: Context) -> Result {
    let node = node(&ctx, "dterm").await?;
    let pod = Pod::run(&node, "upgrade").await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    node.terminate().await?;
    node.serve().await?;
    same!(
        c.status().await?.state(),
        ContainerState::ContainerRunning,
        "after an upgrade"
    );
    c.out(&["true"]).await?;
    pod.end().await
}

/// Database and copies of its rows are gone, so that only the bundle has the pod's record.
async fn pod_whose_records_are_lost_is_adopted(ctx: Context) -> Result {
    let node = node(&ctx, "lost").await?;
    let clean = LeakSnapshot::take(&node)?;
    let pod = Pod::run(&node, "lost").await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let before = (pod.status().await?, c.status().await?);
    let (shim, _) = family(&pod.id)?;
    node.kill().await?;
    for part in ["", "-wal", "-shm"] {
        let path = node.dir.join(format!("root/runtime.db{part}"));
        if path.exists() {
            std::fs::remove_file(path)?;
        }
    }
    std::fs::remove_dir_all(node.dir.join("state/records"))?;
    node.serve().await?;
    let after = (pod.status().await?, c.status().await?);
    same!(
        (after.0.created_at, after.0.network, after.0.metadata),
        (before.0.created_at, before.0.network, before.0.metadata),
        "the pod"
    );
    same!(
        (after.1.state(), after.1.started_at, after.1.metadata),
        (
            ContainerState::ContainerRunning,
            before.1.started_at,
            before.1.metadata
        ),
        "its container"
    );
    same!(family(&pod.id)?.0, shim, "the shim");
    c.out(&["true"]).await?;
    let lost = node.metric("boxlite_quarantined_records_total").await?;
    ensure!(lost > 0, "no lost record is counted");
    pod.end().await?;
    clean.restored(&node).await.map(drop)
}

/// Expects NOTREADY and EXITED within 2 s of `since`, and no remains after Stop and Remove.
async fn expect_noticed(
    pod: &Pod,
    c: &crate::pod::Container,
    since: Instant,
    clean: &LeakSnapshot,
    ctx: &Context,
) -> Result {
    let limit = Duration::from_secs(2);
    poll::until("NOTREADY", limit, || async {
        let state = pod.status().await?.state();
        ensure!(state == PodSandboxState::SandboxNotready, "{state:?}");
        Ok(())
    })
    .await?;
    let status = c
        .exited(
            limit
                .saturating_sub(since.elapsed())
                .max(Duration::from_millis(50)),
        )
        .await?;
    ensure!(
        status.exit_code != 0,
        "a container that was killed exited with 0"
    );
    ensure!(status.finished_at > 0, "no finish time");
    let exec = c.exec_raw(&["true"], 5).await;
    ensure!(exec.is_err(), "ExecSync in a dead pod: {exec:?}");
    pod.end().await?;
    clean.restored(&pod.node).await?;
    let again = Pod::run(&pod.node, "next").await?;
    same!(
        again.sh(&ctx.images.base, "echo fine").await?,
        "fine\n",
        "the next pod"
    );
    again.end().await
}

async fn killed_shim_is_noticed_and_cleaned_up(ctx: Context) -> Result {
    let node = node(&ctx, "kshim").await?;
    let clean = LeakSnapshot::take(&node)?;
    for _ in 0..ctx.rounds(2, 1) {
        let pod = Pod::run(&node, "shim").await?;
        let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
        let (shim, _) = family(&pod.id)?;
        let since = Instant::now();
        kill(shim)?;
        expect_noticed(&pod, &c, since, &clean, &ctx).await?;
    }
    Ok(())
}

async fn killed_vmm_is_noticed_and_cleaned_up(ctx: Context) -> Result {
    let node = node(&ctx, "kvmm").await?;
    let clean = LeakSnapshot::take(&node)?;
    for _ in 0..ctx.rounds(2, 1) {
        let pod = Pod::run(&node, "vmm").await?;
        let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
        let vm = vmm(&pod.id)?;
        let since = Instant::now();
        kill(vm)?;
        expect_noticed(&pod, &c, since, &clean, &ctx).await?;
    }
    Ok(())
}

/// ExecSync and Exec that wait for a command end with the VM, and later calls fail at once.
async fn killed_vmm_ends_calls_into_it(ctx: Context) -> Result {
    let node = node(&ctx, "kcall").await?;
    let pod = Pod::run(&node, "calls").await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let streams = Streams {
        stdin: false,
        stderr: true,
        tty: false,
    };
    let command = ["sh", "-c", "echo started; sleep 1000"];
    let url = c.exec_url(&command, streams).await?;
    let mut session = Session::open(&url, Transport::WebSocket, streams).await?;
    session.until("stdout", "started").await?;
    let mut waiting = tokio::spawn({
        let c = c.clone();
        async move {
            c.exec_raw(&["sh", "-c", "touch /tmp/in; sleep 1000"], 0)
                .await
        }
    });
    let started = ["sh", "-c", "while ! test -e /tmp/in; do usleep 20000; done"];
    c.out(&started).await?;
    let late = c.exec_url(&["true"], streams).await?;

    let limit = Duration::from_secs(2);
    kill(vmm(&pod.id)?)?;
    let ended = async { tokio::join!(&mut waiting, session.status()) };
    let Ok((waiting, session)) = tokio::time::timeout(limit, ended).await else {
        crate::bail!("ExecSync or Exec did not end within {limit:?} of the VM's death")
    };
    let since = Instant::now();
    let gone = format!("pod sandbox {:?} is not running", pod.id);
    let error = match waiting? {
        Ok(response) => crate::bail!("ExecSync succeeded: {response:?}"),
        Err(status) => status.message().to_owned(),
    };
    ensure!(error.contains(&gone), "ExecSync: {error}");
    let error = session?.to_string();
    ensure!(
        error.contains(&pod.id) && error.contains("is not running"),
        "Exec: {error}"
    );
    let error = Session::open(&late, Transport::WebSocket, streams)
        .await?
        .status()
        .await?;
    ensure!(
        error.to_string().contains("Failure"),
        "Exec started late: {error}"
    );
    let error = c.exec_raw(&["true"], 0).await;
    ensure!(error.is_err(), "ExecSync after the VM's death: {error:?}");
    ensure!(
        since.elapsed() < limit,
        "late calls took {:?}",
        since.elapsed()
    );
    pod.end().await
}

async fn killed_helpers_are_noticed_and_cleaned_up(ctx: Context) -> Result {
    let node = node(&ctx, "khelp").await?;
    let clean = LeakSnapshot::take(&node)?;
    for helper in ["virtiofsd", "vhost-device"] {
        let pod = Pod::run(&node, "helper").await?;
        let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
        let (_, below) = family(&pod.id)?;
        let named = |pid: &i32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|n| n.starts_with(helper))
        };
        let Some(pid) = below.into_iter().find(named) else {
            crate::bail!("no {helper} below the shim")
        };
        let since = Instant::now();
        kill(pid)?;
        expect_noticed(&pod, &c, since, &clean, &ctx).await?;
    }
    Ok(())
}

async fn pods_removed_during_downtime_are_forgotten(ctx: Context) -> Result {
    let node = node(&ctx, "kboth").await?;
    let clean = LeakSnapshot::take(&node)?;
    let pod = Pod::run(&node, "both").await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let (shim, _) = family(&pod.id)?;
    node.kill().await?;
    kill(shim)?;
    node.serve().await?;
    same!(
        pod.status().await?.state(),
        PodSandboxState::SandboxNotready,
        "a pod whose shim died during downtime"
    );
    same!(
        c.status().await?.state(),
        ContainerState::ContainerExited,
        "its container"
    );
    pod.end().await?;
    clean
        .restored_by_another_daemon(&node, ctx.patience(10))
        .await
}

/// A VMM that is stopped answers nothing, as a guest whose agent hangs.
async fn silent_guest_is_stopped_in_time(ctx: Context) -> Result {
    let node = node(&ctx, "mute").await?;
    let limit = Duration::from_secs(10);
    for (name, containers) in [("mute", 2), ("empty", 0)] {
        let pod = Pod::run(&node, name).await?;
        let mut started = Vec::new();
        for n in 0..containers {
            let name = format!("c{n}");
            let command = ["sleep", "1000"];
            started.push(pod.start(&name, &ctx.images.base, &command).await?);
        }
        nix::sys::signal::kill(Pid::from_raw(vmm(&pod.id)?), Signal::SIGSTOP)?;
        if let Some(c) = started.first() {
            let grace = Duration::from_secs(2);
            let began = Instant::now();
            let stopped = c.stop(2).await;
            let took = began.elapsed();
            ensure!(
                took >= grace && took < grace + limit,
                "StopContainer took {took:?}: {stopped:?}"
            );
        }
        let began = Instant::now();
        pod.stop().await?;
        let took = began.elapsed();
        ensure!(took < limit, "StopPodSandbox took {took:?}");
        pod.end().await?;
    }
    Ok(())
}
