//! What can die: the shim, containerd, and a containerd's version.

use super::daemon::{Containerd, Version, run_args};
use super::pods::{NOTICE, node, sleeper};
use super::tasks::{clear_fifos, told_exit};
use super::{Case, Shared, before};
use crate::outcome::Result;
use crate::pod::{Pod, container_spec};
use crate::runner::case;
use crate::{ensure, process, same, wait};
use k8s_cri::v1::{ContainerState, Mount};
use std::time::SystemTime;

/// All of them.
pub fn cases() -> Vec<Case> {
    vec![
        case("fault::a_killed_shim_is_cleaned_up", 90, shim_killed),
        case("fault::a_vm_that_dies_is_an_exit", 90, vm_killed),
        case("fault::a_killed_shim_of_a_pod", 120, pod_shim_killed),
        case(
            "fault::containerd_killed_finds_its_tasks_and_pods",
            150,
            containerd_killed,
        ),
        case("fault::a_sandboxers_pods_are_found_too", 150, sandboxer)
            .unless(before(Version::V2), "the Sandbox API came with 2.0"),
        case("fault::exits_while_containerd_is_away", 90, missed_exits),
        case("fault::an_upgrade_keeps_tasks_and_pods", 200, upgrade)
            .unless(|lab| lab.version >= Version::V2, "it goes from 1.x to 2.x"),
    ]
}

fn shim_of(id: &str) -> Result<(i32, Vec<i32>)> {
    process::family(id)
}

/// Waits until none of the processes is left.
async fn gone(pids: &[i32], lab: &Shared) -> Result {
    wait::until("the VM's processes are gone", lab.patience(10), || async {
        let left: Vec<_> = process::pids(&[])?
            .into_iter()
            .filter(|pid| pids.contains(pid))
            .collect();
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await
}

async fn shim_killed(lab: Shared) -> Result {
    let ctr = &lab.shared;
    ctr.sleeper("victim").await?;
    let work = std::fs::canonicalize(ctr.bundle("default", "victim").join("work"))?;
    ensure!(
        work.join("scratch.img").exists(),
        "the scratch disk is not in {}",
        work.display()
    );
    let (shim, below) = shim_of("victim")?;
    process::kill(shim)?;
    gone(&below, &lab).await?;
    // containerd notices the broken connection and runs `delete`: the task goes with its bundle, scratch disk and all.
    wait::until("the task is gone", NOTICE, || async {
        let list = ctr.ok(&["task", "ls", "-q"]).await?;
        ensure!(!list.contains("victim"), "{list}");
        ensure!(
            !work.join("scratch.img").exists(),
            "the scratch disk is still there"
        );
        Ok(())
    })
    .await?;
    ctr.ok(&["container", "delete", "victim"]).await?;
    clear_fifos()?;
    // The id is free for a next one.
    let output = ctr.run(&["--rm"], "victim", &["echo", "again"]).await?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

async fn vm_killed(lab: Shared) -> Result {
    let ctr = &lab.shared;
    ctr.sleeper("vmdies").await?;
    let (_, below) = shim_of("vmdies")?;
    // The vmm child, or whatever of it has the most memory: the VM.
    let Some(vm) = below.iter().copied().max_by_key(|pid| process::rss(*pid)) else {
        crate::bail!("no VM")
    };
    process::kill(vm)?;
    ctr.stopped("vmdies").await?;
    let deleted = ctr.output(&["task", "delete", "vmdies"]).await?;
    told_exit(&deleted, 137)?;
    ctr.ok(&["container", "delete", "vmdies"]).await.map(drop)
}

async fn pod_shim_killed(lab: Shared) -> Result {
    let (pod, container) = sleeper(&lab.shared, "podshim").await?;
    let (shim, below) = shim_of(&pod.id)?;
    process::kill(shim)?;
    gone(&below, &lab).await?;
    let status = container.exited(NOTICE).await?;
    ensure!(status.exit_code != 0, "exit code {}", status.exit_code);
    pod.stop().await?;
    pod.remove().await
}

/// A task and a pod, something done to containerd, and both are as they were.
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
    wait::until("the container is RUNNING", NOTICE, || async {
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
    // Exits are still heard.
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
        more.exited(NOTICE).await?.exit_code,
        4,
        "exit code of a container made afterwards"
    );
    pod.stop().await?;
    pod.remove().await?;
    daemon.remove("live").await
}

async fn containerd_killed(lab: Shared) -> Result {
    let daemon = lab.own("rs", |_| {}).await?;
    survives(&daemon, || async {
        daemon.kill().await?;
        daemon.serve(lab.version).await
    })
    .await
}

/// A task and a container that end when nobody listens: their codes and times are there afterwards.
async fn missed_exits(lab: Shared) -> Result {
    let daemon = lab.own("away", |_| {}).await?;
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
    wait::until("both have ended", lab.patience(20), || async {
        for name in ["task", "pod"] {
            ensure!(dir.join(name).exists(), "{name} runs");
        }
        Ok(())
    })
    .await?;
    daemon.serve(lab.version).await?;
    daemon.stopped("away").await?;
    told_exit(&daemon.output(&["task", "delete", "away"]).await?, 7)?;
    daemon.ok(&["container", "delete", "away"]).await?;
    let status = container.exited(NOTICE).await?;
    same!(status.exit_code, 8, "exit code of the container");
    // The guest's clock may be a little off.
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

async fn sandboxer(lab: Shared) -> Result {
    let daemon = lab.own("rb", |options| options.sandboxer = "shim").await?;
    survives(&daemon, || async {
        daemon.kill().await?;
        daemon.serve(lab.version).await
    })
    .await
}

async fn upgrade(lab: Shared) -> Result {
    let daemon = lab.own("up", |_| {}).await?;
    survives(&daemon, || async {
        daemon.kill().await?;
        daemon.serve(Version::V2).await
    })
    .await
}
