//! Failures of the shim and containerd, and upgrades of containerd.

use super::daemon::{Containerd, Version, run_args};
use super::pods::{NOTICE_TIMEOUT, node, sleeper};
use super::tasks::{clear_fifos, expect_exit_code};
use super::{Case, Context, before};
use crate::case;
use crate::failure::Result;
use crate::pod::{Pod, container_spec};
use crate::{ensure, poll, process, same};
use k8s_cri::v1::{ContainerState, Mount};
use std::time::SystemTime;

/// Returns the cases.
pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(killed_shim_is_cleaned_up, 90),
        case!(dead_vm_is_reported_as_exit, 90),
        case!(killed_pod_shim_is_cleaned_up, 120),
        case!(killed_containerd_finds_its_tasks_and_pods, 150),
        case!(killed_containerd_finds_sandboxer_pods, 150)
            .unless(before(Version::V2), "the Sandbox API came with 2.0"),
        case!(exits_during_downtime_are_reported, 90),
        case!(upgrade_keeps_tasks_and_pods, 200).unless(
            |ctx| ctx.version >= Version::V2,
            "the upgrade is from 1.x to 2.x",
        ),
    ]
}

fn shim_of(id: &str) -> Result<(i32, Vec<i32>)> {
    process::family(id)
}

/// Waits until all of the processes have ended.
async fn gone(pids: &[i32], ctx: &Context) -> Result {
    poll::until(
        "the VM's processes have ended",
        ctx.patience(10),
        || async {
            let left: Vec<_> = process::pids(&[])?
                .into_iter()
                .filter(|pid| pids.contains(pid))
                .collect();
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        },
    )
    .await
}

async fn killed_shim_is_cleaned_up(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    ctr.sleeper("victim").await?;
    let work = std::fs::canonicalize(ctr.bundle("default", "victim").join("work"))?;
    ensure!(
        work.join("scratch.img").exists(),
        "the scratch disk is not in {}",
        work.display()
    );
    let (shim, below) = shim_of("victim")?;
    process::kill(shim)?;
    gone(&below, &ctx).await?;
    // containerd notices the broken connection and runs `delete`, which removes the task, its bundle and scratch disk.
    poll::until("the task is gone", NOTICE_TIMEOUT, || async {
        let list = ctr.ok(&["task", "ls", "-q"]).await?;
        ensure!(!list.contains("victim"), "{list}");
        ensure!(
            !work.join("scratch.img").exists(),
            "the scratch disk still exists"
        );
        Ok(())
    })
    .await?;
    ctr.ok(&["container", "delete", "victim"]).await?;
    clear_fifos()?;
    // The id can be reused.
    let output = ctr.run(&["--rm"], "victim", &["echo", "again"]).await?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

async fn dead_vm_is_reported_as_exit(ctx: Context) -> Result {
    let ctr = &ctx.shared;
    ctr.sleeper("vmdies").await?;
    let (_, below) = shim_of("vmdies")?;
    // The process with the most memory is the VM.
    let Some(vm) = below.iter().copied().max_by_key(|pid| process::rss(*pid)) else {
        crate::bail!("no VM")
    };
    process::kill(vm)?;
    ctr.stopped("vmdies").await?;
    let deleted = ctr.output(&["task", "delete", "vmdies"]).await?;
    expect_exit_code(&deleted, 137)?;
    ctr.ok(&["container", "delete", "vmdies"]).await.map(drop)
}

async fn killed_pod_shim_is_cleaned_up(ctx: Context) -> Result {
    let (pod, container) = sleeper(&ctx.shared, "podshim").await?;
    let (shim, below) = shim_of(&pod.id)?;
    process::kill(shim)?;
    gone(&below, &ctx).await?;
    let status = container.exited(NOTICE_TIMEOUT).await?;
    ensure!(status.exit_code != 0, "exit code {}", status.exit_code);
    pod.stop().await?;
    pod.remove().await
}

/// Starts a task and a pod, applies `change` to containerd, and expects both unchanged.
async fn survives<F: Future<Output = Result>>(
    daemon: &Containerd,
    change: impl FnOnce() -> F,
) -> Result {
    daemon.sleeper("live").await?;
    let (pod, container) = sleeper(daemon, "live").await?;
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let before = container.out(&boot).await?;
    let pid = daemon.pid("live").await?;
    change().await?;
    daemon.state("live", "RUNNING").await?;
    same!(daemon.pid("live").await?, pid, "pid of the task");
    poll::until("the container is RUNNING", NOTICE_TIMEOUT, || async {
        same!(
            container.status().await?.state(),
            ContainerState::ContainerRunning,
            "state"
        );
        Ok(())
    })
    .await?;
    same!(container.out(&boot).await?, before, "boot id");
    let seen = daemon
        .ok(&[
            "task",
            "exec",
            "--exec-id",
            "after",
            "live",
            "echo",
            "alive",
        ])
        .await?;
    same!(seen.trim(), "alive", "an exec in the task");
    // Exits are still reported.
    container.stop(0).await?;
    same!(
        container.status().await?.state(),
        ContainerState::ContainerExited,
        "state"
    );
    let more = pod
        .start("more", super::IMAGE, &["sh", "-c", "exit 4"])
        .await?;
    same!(
        more.exited(NOTICE_TIMEOUT).await?.exit_code,
        4,
        "exit code of a container made afterwards"
    );
    pod.stop().await?;
    pod.remove().await?;
    daemon.remove("live").await
}

async fn killed_containerd_finds_its_tasks_and_pods(ctx: Context) -> Result {
    let daemon = ctx.dedicated_daemon("rs", |_| {}).await?;
    survives(&daemon, || async {
        daemon.kill().await?;
        daemon.serve(ctx.version).await
    })
    .await
}

/// Ends a task and a container while containerd is down: exit codes and times must be reported afterwards.
async fn exits_during_downtime_are_reported(ctx: Context) -> Result {
    let daemon = ctx.dedicated_daemon("away", |_| {}).await?;
    let dir = daemon.dir.join("shared");
    std::fs::create_dir_all(&dir)?;
    let script = |name: &str, code: u8| {
        format!("until [ -e /out/end ]; do sleep 0.1; done; echo > /out/{name}; exit {code}")
    };
    let bind = format!("type=bind,src={},dst=/out,options=rbind:rw", dir.display());
    let task = script("task", 7);
    let run = run_args(&["-d", "--mount", &bind], "away", &["sh", "-c", &task]);
    daemon.ok(&run).await?;
    let pod = Pod::run(&node(&daemon)?, "away").await?;
    let mut spec = container_spec("c", super::IMAGE, &["sh", "-c", &script("pod", 8)]);
    spec.mounts.push(Mount {
        container_path: "/out".to_owned(),
        host_path: dir.display().to_string(),
        ..Default::default()
    });
    let container = pod.start_with(spec).await?;

    daemon.kill().await?;
    std::fs::write(dir.join("end"), "")?;
    poll::until("both have ended", ctx.patience(20), || async {
        for name in ["task", "pod"] {
            ensure!(dir.join(name).exists(), "{name} runs");
        }
        Ok(())
    })
    .await?;
    daemon.serve(ctx.version).await?;
    daemon.stopped("away").await?;
    expect_exit_code(&daemon.output(&["task", "delete", "away"]).await?, 7)?;
    daemon.ok(&["container", "delete", "away"]).await?;
    let status = container.exited(NOTICE_TIMEOUT).await?;
    same!(status.exit_code, 8, "exit code of the container");
    // The guest's clock may differ slightly.
    let now = unix_ns()? + 1_000_000_000;
    ensure!(
        (status.started_at..now).contains(&status.finished_at),
        "started at {}, finished at {}, seen at {now}",
        status.started_at,
        status.finished_at
    );
    pod.end().await
}

fn unix_ns() -> Result<i64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(i64::try_from(now.as_nanos())?)
}

async fn killed_containerd_finds_sandboxer_pods(ctx: Context) -> Result {
    let daemon = ctx
        .dedicated_daemon("rb", |options| options.sandboxer = "shim")
        .await?;
    survives(&daemon, || async {
        daemon.kill().await?;
        daemon.serve(ctx.version).await
    })
    .await
}

async fn upgrade_keeps_tasks_and_pods(ctx: Context) -> Result {
    let daemon = ctx.dedicated_daemon("up", |_| {}).await?;
    survives(&daemon, || async {
        daemon.kill().await?;
        daemon.serve(Version::V2).await
    })
    .await
}
