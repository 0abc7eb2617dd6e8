//! Disturbances of the node: kubelet restarted, runtime killed and upgraded under live pods, a reboot, a drain.

use crate::cluster::NODE;
use crate::cluster::context::{ClusterContext, POD_TIMEOUT, container, restarts};
use crate::cluster::pods::{self, IDLE, pod, script};
use crate::cluster::until;
use crate::failure::Result;
use crate::runner::Case;
use crate::{case, ensure, process, same};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

type Context = Arc<ClusterContext>;

pub(super) fn cases() -> Vec<Case<ClusterContext>> {
    vec![
        case!(kubelet_restart_keeps_containers, 300),
        case!(killed_and_upgraded_runtime_keeps_twenty_pods, 900),
        case!(drained_node_evicts_and_takes_pods_again, 300),
        case!(rebooted_node_restarts_every_pod, 400),
    ]
}

/// Pods under a restarted kubelet.
const FEW_PODS: usize = 3;
/// Pods under a killed and upgraded runtime.
const MANY_PODS: usize = 20;

/// Runs pods, disturbs the node and checks that no container was replaced or restarted.
async fn survives<F: Future<Output = Result>>(ctx: &Context, pods: usize, disturb: F) -> Result {
    let counter = "i=0; while :; do echo $i; i=$((i+1)); sleep 1; done";
    let names: Vec<_> = (0..pods).map(|i| format!("live-{i}")).collect();
    for name in &names {
        let mut object = script(name, counter);
        object["spec"]["restartPolicy"] = json!("Always");
        ctx.kubectl.apply(&object).await?;
    }
    let mut ids = Vec::new();
    for name in &names {
        ids.push(container(&ctx.ready(name).await?, "main")["containerID"].clone());
    }
    disturb.await?;
    // A new pod shows that kubelet and runtime work again.
    ctx.run_pod(&script("later", IDLE)).await?;
    for (name, id) in names.iter().zip(&ids) {
        let pod = ctx.ready(name).await?;
        same!(
            container(&pod, "main")["containerID"],
            *id,
            "container of {name}"
        );
        same!(restarts(&pod), 0, "restarts of {name}");
        same!(
            ctx.exec(name, "echo here").await?,
            "here\n",
            "exec in {name}"
        );
        let before = ctx.logs(name).await?.lines().count();
        until("the log grows", Duration::from_secs(30), || async {
            let now = ctx.logs(name).await?.lines().count();
            ensure!(now > before, "{now} lines");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

async fn kubelet_restart_keeps_containers(ctx: Context) -> Result {
    let worker = &ctx.cluster.worker;
    survives(&ctx, FEW_PODS, async {
        worker.kubelet().kill().await?;
        worker.start_kubelet().await
    })
    .await
}

/// An upgrade: the runtime ends after SIGTERM and its successor takes over the pods. Before, it crashes.
async fn killed_and_upgraded_runtime_keeps_twenty_pods(ctx: Context) -> Result {
    let node = &ctx.cluster.worker.node;
    survives(&ctx, MANY_PODS, async {
        node.kill().await?;
        node.serve().await?;
        node.terminate().await?;
        node.serve().await
    })
    .await
}

async fn drained_node_evicts_and_takes_pods_again(ctx: Context) -> Result {
    let mut object = script("server", IDLE);
    object["spec"]["restartPolicy"] = json!("Always");
    ctx.kubectl
        .apply(
            &json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "server"},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "server"}}, "template": {
                "metadata": {"labels": {"app": "server"}}, "spec": object["spec"]}}}),
        )
        .await?;
    let wait = ["rollout", "status", "deployment/server", "--timeout=150s"];
    ctx.kubectl.run(&wait).await?;
    let drained = ctx.kubectl.run(&["drain", NODE, "--timeout=120s"]).await;
    let pods = ctx.kubectl.json(&["get", "pods"]).await?;
    ctx.kubectl.run(&["uncordon", NODE]).await?;
    let drained = drained?;
    ensure!(drained.contains("drained"), "{drained}");
    let phases: Vec<_> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| &p["status"]["phase"])
        .collect();
    ensure!(
        phases.iter().all(|p| **p == "Pending"),
        "pods on a drained node: {phases:?}"
    );
    ctx.kubectl.run(&wait).await.map(drop)
}

/// All processes of the node end at once and its runtime directories are empty afterwards, as after a power cut.
async fn rebooted_node_restarts_every_pod(ctx: Context) -> Result {
    let names = ["first", "second"];
    for name in names {
        let main = pods::container(
            "main",
            "test -e /mark && echo stale; touch /mark; exec sleep infinity",
        );
        let mut object = pod(name, &[main]);
        object["spec"]["restartPolicy"] = json!("Always");
        ctx.kubectl.apply(&object).await?;
    }
    let mut before = Vec::new();
    for name in names {
        before.push(container(&ctx.ready(name).await?, "main")["containerID"].clone());
    }
    let worker = &ctx.cluster.worker;
    worker.kubelet().kill().await?;
    worker.node.kill().await?;
    for pid in process::pids(&["containerd-shim"])? {
        // A child may have ended with its parent.
        let _ = process::kill(pid);
    }
    until(
        "every process of the pods has ended",
        POD_TIMEOUT,
        || async {
            let left = process::pids(&["qemu-system"])?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        },
    )
    .await?;
    forget(&ctx)?;
    worker.node.serve().await?;
    worker.start_kubelet().await?;
    for (name, id) in names.iter().zip(&before) {
        let pod = ctx
            .wait(name, "was restarted", |pod| {
                restarts(pod) > 0 && crate::cluster::condition(pod, "Ready") == "True"
            })
            .await?;
        ensure!(
            container(&pod, "main")["containerID"] != *id,
            "the container of {name} was not replaced"
        );
        same!(
            ctx.logs(name).await?,
            "",
            "log of the new container of {name}"
        );
    }
    Ok(())
}

/// Removes all that a reboot removes: mounts and files of the state directory, network namespaces and interfaces.
fn forget(ctx: &Context) -> Result {
    let state = ctx.cluster.worker.node.dir.join("state");
    // One at a time: an unmount propagates to other mounts of the list.
    while let Some(point) = last_mount(&[&state, Path::new("/run/netns")])? {
        crate::namespaces::run("umount", &["--lazy", &point.display().to_string()])?;
    }
    for entry in std::fs::read_dir("/run/netns")? {
        std::fs::remove_file(entry?.path())?;
    }
    std::fs::remove_dir_all(&state)?;
    Ok(())
}

/// Returns the mount point below one of `dirs` that was mounted last.
fn last_mount(dirs: &[&Path]) -> Result<Option<PathBuf>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points: Vec<_> = boxlite_sys::mountinfo::mounts(&text)
        .map(|mount| mount.point)
        .collect();
    // The node's /run covers earlier mounts below it, which cannot be unmounted.
    let run = points.iter().rposition(|point| point == "/run");
    let reachable = points.into_iter().skip(run.map_or(0, |at| at + 1));
    Ok(reachable
        .rev()
        .find(|point| dirs.iter().any(|dir| point.starts_with(dir))))
}
