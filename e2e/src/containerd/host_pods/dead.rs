//! A containerd that is killed: its pods become unknown, the lists and the VMs go on, and its return restores everything.

use super::super::stock;
use super::{Context, HostPodsNode};
use crate::client::answer;
use crate::failure::{During, Result};
use crate::node::Node;
use crate::pod::{Container, Pod, pod_spec, pull};
use crate::{ensure, event_stream, poll, same};
use k8s_cri::v1::*;
use std::sync::Arc;
use tonic::Code;

const SLEEPER: [&str; 2] = ["sleep", "1000"];

pub(super) async fn dead_containerd_hides_only_its_pods(ctx: Context) -> Result {
    let host_pods = HostPodsNode::start(&ctx, "hd").await?;
    let (node, image) = (&host_pods.node, &host_pods.image("base"));
    pull(node, image).await?;
    let vm = Pod::run(node, "vm").await?;
    let in_vm = vm.start("main", image, &SLEEPER).await?;
    let host = Pod::run_by(node, pod_spec(node, "host"), "runc").await?;
    let on_host = host.start("main", image, &SLEEPER).await?;
    let mut events = event_stream::follow(node).await?;
    host_pods.containerd.kill().await?;
    is_unknown(node, &vm, &in_vm, &host, &on_host).await?;
    // Pods in VMs come and go, and so do their events.
    let more = vm.start("more", image, &["true"]).await?;
    more.exited(ctx.patience(20)).await?;
    let wanted = [(more.id.as_str(), ContainerEventType::ContainerStoppedEvent)];
    event_stream::wait_for(&mut events, &wanted, ctx.patience(10)).await?;
    more.remove().await?;
    // The ids survive a restart of the daemon, too.
    node.terminate().await?;
    node.serve().await?;
    is_unknown(node, &vm, &in_vm, &host, &on_host)
        .await
        .during("after a restart of the daemon")?;
    stock::serve(&host_pods.containerd, &host_pods.config, &[]).await?;
    // runc's container outlived containerd.
    poll::until("containerd is reachable", ctx.patience(20), || async {
        on_host.out(&["true"]).await
    })
    .await?;
    let states: Vec<_> = node.containers().await?.iter().map(|c| c.state()).collect();
    same!(states, [ContainerState::ContainerRunning; 2], "states");
    let log = std::fs::read_to_string(node.log())?;
    for message in ["is unreachable", "is reachable again"] {
        let message = format!("container runtime of host pods {message}");
        ensure!(log.contains(&message), "{message:?} is not in the log");
    }
    for pod in [&host, &vm] {
        pod.end().await?;
    }
    host_pods.end().await
}

/// Lists and calls while containerd is dead.
async fn is_unknown(
    node: &Arc<Node>,
    vm: &Pod,
    in_vm: &Container,
    host: &Pod,
    on_host: &Container,
) -> Result {
    in_vm.out(&["true"]).await?;
    let ready = PodSandboxState::SandboxReady;
    for pod in node.pods().await? {
        same!(pod.state() == ready, pod.id == vm.id, "READY of {}", pod.id);
    }
    for container in node.containers().await? {
        let expected = match container.id == on_host.id {
            true => ContainerState::ContainerUnknown,
            false => ContainerState::ContainerRunning,
        };
        same!(container.state(), expected, "state of {}", container.id);
    }
    same!(node.pods().await?.len(), 2, "pods");
    same!(node.containers().await?.len(), 2, "containers");
    let request = ListContainerStatsRequest::default();
    let stats = node.cri.runtime().list_container_stats(request).await;
    let stats = answer("ListContainerStats", stats)?.stats.into_iter();
    let ids: Vec<_> = stats.filter_map(|stats| stats.attributes).collect();
    same!(ids.len(), 1, "containers with statistics");
    same!(ids[0].id, in_vm.id, "container with statistics");
    let refused = on_host.exec_raw(&["true"], 0).await.err();
    let again = RunPodSandboxRequest {
        config: Some(pod_spec(node, "more")),
        runtime_handler: "runc".into(),
    };
    let run = node.cri.runtime().run_pod_sandbox(again).await.err();
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: host.id.clone(),
    };
    let stop = node.cri.runtime().stop_pod_sandbox(stop).await.err();
    for error in [refused, run, stop] {
        let Some(error) = error else {
            crate::bail!("a call for a host pod succeeded without containerd")
        };
        same!(error.code(), Code::Unavailable, "code: {}", error.message());
        ensure!(error.message().contains("c.sock"), "{}", error.message());
    }
    // Ids that neither side has are answered without containerd.
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: "ab".repeat(32),
    };
    answer(
        "StopPodSandbox",
        node.cri.runtime().stop_pod_sandbox(stop).await,
    )?;
    let status = StatusRequest { verbose: false };
    let status = answer("Status", node.cri.runtime().status(status).await)?;
    for condition in status.status.unwrap_or_default().conditions {
        let is_host = condition.r#type == "HostPodsReady";
        same!(condition.status, !is_host, "{}", condition.r#type);
    }
    Ok(())
}
