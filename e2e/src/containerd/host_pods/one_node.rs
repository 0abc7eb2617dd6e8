//! Host pods and VMs side by side: every call of both, and the lists, statistics, events and images of a node as one.

use super::{Context, HostPodsNode};
use crate::client::answer;
use crate::failure::{During, Result};
use crate::node::Node;
use crate::pod::{Container, Pod, container_spec, pod_spec, pull};
use crate::stream::{Session, Streams, Transport, forward};
use crate::{cgroups, ensure, event_stream, poll, same};
use k8s_cri::v1::*;
use std::collections::BTreeSet;
use tonic::Streaming;

const BOOT_ID: [&str; 2] = ["cat", "/proc/sys/kernel/random/boot_id"];
/// Prints a line, serves a port, and answers each line of its input.
const SERVER: &str =
    "echo started; nc -ll -p 8080 -e cat & while read line; do echo got $line; done";
const STREAMS: Streams = Streams {
    stdin: true,
    stderr: true,
    tty: false,
};

/// Returns a pod with a cgroup, without which containerd has no statistics of it.
fn host_pod(ctx: &Context, node: &Node, name: &str) -> PodSandboxConfig {
    let mut config = pod_spec(node, name);
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent = format!("/{}/{name}", cgroups::name(&ctx.scratch));
    config
}

/// Returns the pod of a system component: in kube-system and in the host's network.
fn system_pod(ctx: &Context, node: &Node) -> PodSandboxConfig {
    let mut config = host_pod(ctx, node, "proxy");
    config.metadata.get_or_insert_default().namespace = "kube-system".into();
    // As a kubelet sends it: a pod in the host's network has the node's hostname.
    config.hostname.clear();
    let linux = config.linux.get_or_insert_default();
    let security = linux.security_context.get_or_insert_default();
    security.privileged = false;
    let namespaces = security.namespace_options.get_or_insert_default();
    namespaces.network = NamespaceMode::Node.into();
    config
}

pub(super) async fn host_pods_and_vms_are_one_node(ctx: Context) -> Result {
    let host_pods = HostPodsNode::start(&ctx, "hp").await?;
    let (node, image) = (&host_pods.node, &host_pods.image("base"));
    let mut events = event_stream::follow(node).await?;
    // Into this runtime's store; containerd gets its copy when the first host pod needs it.
    let id = pull(node, image).await?;
    let vm = Pod::run(node, "vm").await?;
    let by_handler = Pod::run_by(node, host_pod(&ctx, node, "byhandler"), "runc").await?;
    let by_namespace = Pod::run_with(node, system_pod(&ctx, node)).await?;
    let pods = [&vm, &by_handler, &by_namespace];
    let host_boot = std::fs::read_to_string(BOOT_ID[1])?;
    let mut containers = Vec::new();
    for (pod, is_vm) in pods.into_iter().zip([true, false, false]) {
        let mut config = container_spec("main", image, &["sh", "-c", SERVER]);
        config.stdin = true;
        let container = pod.start_with(config).await?;
        let boot = container.out(&BOOT_ID).await?;
        let name = &pod.config.hostname;
        same!(boot != host_boot, is_vm, "own kernel of {name:?}");
        calls_work(&ctx, &container).await.during(name)?;
        streams_work(&container).await.during(name)?;
        containers.push(container);
    }
    lists_are_one(node, &pods, &containers, &id).await?;
    rules_are_logged(node)?;
    images_are_one(&host_pods, &by_handler, &vm).await?;
    for container in &containers {
        container.stop(0).await?;
    }
    events_are_one(&ctx, &mut events, &containers).await?;
    for pod in pods {
        pod.end().await?;
    }
    same!(node.pods().await?, Vec::new(), "pods after their removal");
    removal_leaves_no_copy(&host_pods, &id).await?;
    // runc does not remove the cgroups of pods; a kubelet does.
    cgroups::remove(&ctx.scratch)?;
    host_pods.end().await
}

/// Uses the calls of a running container that answer at once.
async fn calls_work(ctx: &Context, container: &Container) -> Result {
    poll::until("the output is in the log", ctx.patience(20), || async {
        let text = std::fs::read_to_string(container.log())?;
        ensure!(text.ends_with(" stdout F started\n"), "{text:?}");
        Ok(())
    })
    .await?;
    let failed = container.exec(&["sh", "-c", "exit 5"]).await?;
    same!(failed.exit_code, 5, "exit code of an exec");
    let stats = container.stats().await?;
    let used = stats.memory.and_then(|memory| memory.working_set_bytes);
    ensure!(used.is_some(), "no memory in the stats");
    let request = ReopenContainerLogRequest {
        container_id: container.id.clone(),
    };
    let mut runtime = container.pod.node.cri.runtime();
    let rotated = container.log().with_extension("old");
    std::fs::rename(container.log(), rotated)?;
    let reopened = runtime.reopen_container_log(request).await;
    answer("ReopenContainerLog", reopened)?;
    ensure!(container.log().exists(), "the log was not reopened");
    let short = ContainerStatusRequest {
        container_id: container.id[..13].to_owned(),
        verbose: false,
    };
    let status = answer("ContainerStatus", runtime.container_status(short).await)?;
    same!(
        status.status.unwrap_or_default().id,
        container.id,
        "id of a prefix"
    );
    Ok(())
}

/// Uses exec, attach and port-forward, over SPDY as an API server does; containerd refuses a WebSocket client without Origin.
async fn streams_work(container: &Container) -> Result {
    let url = container.exec_url(&["cat"], STREAMS).await?;
    let mut session = Session::open(&url, Transport::Spdy, STREAMS).await?;
    session.send("stdin", b"there and back\n").await?;
    session.close("stdin").await?;
    let echoed = session.rest("stdout").await?;
    same!(echoed, b"there and back\n", "output of an exec");
    let url = container.attach_url(STREAMS).await?;
    let mut session = Session::open(&url, Transport::Spdy, STREAMS).await?;
    session.send("stdin", b"word\n").await?;
    session.until("stdout", "got word").await?;
    let mut client = forward::connect(&container.pod.forward_url().await?, Transport::Spdy).await?;
    let (mut data, _error) = forward::dial(&mut client, "8080", "1").await?;
    client.send(data.id, b"through the port", true).await?;
    let echoed = forward::rest(&mut data).await?;
    same!(echoed, b"through the port", "forwarded bytes");
    Ok(())
}

/// The lists and statistics have the pods and containers of both sides.
async fn lists_are_one(
    node: &Node,
    pods: &[&Pod; 3],
    containers: &[Container],
    image: &str,
) -> Result {
    let pod_ids: BTreeSet<_> = pods.iter().map(|pod| pod.id.clone()).collect();
    let container_ids: BTreeSet<_> = containers.iter().map(|c| c.id.clone()).collect();
    let listed: BTreeSet<_> = node.pods().await?.into_iter().map(|pod| pod.id).collect();
    same!(listed, pod_ids, "pods");
    let listed = node.containers().await?;
    let ids: BTreeSet<_> = listed.iter().map(|c| c.id.clone()).collect();
    same!(ids, container_ids, "containers");
    for container in &listed {
        // The kubelet's rule for the images in use.
        let used = match container.image_id.is_empty() {
            true => &container.image_ref,
            false => &container.image_id,
        };
        same!(used, image, "image of {}", container.id);
    }
    let mut runtime = node.cri.runtime();
    let request = ListContainerStatsRequest::default();
    let list = answer(
        "ListContainerStats",
        runtime.list_container_stats(request).await,
    )?;
    let ids = list.stats.into_iter().filter_map(|stats| stats.attributes);
    let ids: BTreeSet<_> = ids.map(|attributes| attributes.id).collect();
    same!(ids, container_ids, "containers with statistics");
    let all = pod_stats(node, PodSandboxStatsFilter::default()).await?;
    same!(all, pod_ids, "pods with statistics");
    for pod in pods {
        let filter = PodSandboxStatsFilter {
            id: pod.id.clone(),
            ..Default::default()
        };
        let one = pod_stats(node, filter).await?;
        same!(one, [pod.id.clone()].into(), "statistics of one pod");
    }
    Ok(())
}

async fn pod_stats(node: &Node, filter: PodSandboxStatsFilter) -> Result<BTreeSet<String>> {
    let request = ListPodSandboxStatsRequest {
        filter: Some(filter),
    };
    let list = node.cri.runtime().list_pod_sandbox_stats(request).await;
    let stats = answer("ListPodSandboxStats", list)?.stats;
    let ids = stats.into_iter().filter_map(|stats| stats.attributes);
    Ok(ids.map(|attributes| attributes.id).collect())
}

fn rules_are_logged(node: &Node) -> Result {
    let log = std::fs::read_to_string(node.log())?;
    for rule in ["host_pods.handlers lists", "host_pods.namespaces lists"] {
        let is_rule = |line: &&str| line.contains("pod runs without a VM") && line.contains(rule);
        let count = log.lines().filter(is_rule).count();
        same!(count, 1, "log lines of {rule}");
    }
    Ok(())
}

/// Both stores are one to a client: an image in both is listed once, one of containerd's is used for a VM, and a removal
/// leaves neither copy.
async fn images_are_one(host_pods: &HostPodsNode, host: &Pod, vm: &Pod) -> Result {
    let (node, theirs) = (&host_pods.node, &host_pods.theirs);
    let (image, more) = (&host_pods.image("base"), &host_pods.image("more"));
    let request = PullImageRequest {
        image: Some(spec(more)),
        auth: None,
        sandbox_config: Some(host.config.clone()),
    };
    answer("PullImage", node.cri.image().pull_image(request).await)?;
    ensure!(
        status(theirs, more).await?.is_some(),
        "the image of a host pod is not in containerd's store"
    );
    let request = ListImagesRequest::default();
    let images = node.cri.image().list_images(request).await;
    let images = answer("ListImages", images)?.images;
    for image in [image, more, &host_pods.image("pause")] {
        let is_named = |listed: &&Image| listed.repo_tags.contains(image);
        let count = images.iter().filter(is_named).count();
        same!(count, 1, "entries of {image}");
    }
    let in_vm = vm.create("more", more, &["true"]).await?;
    in_vm.remove().await?;
    let usage = node.cri.image().image_fs_info(ImageFsInfoRequest {}).await;
    let usage = answer("ImageFsInfo", usage)?.image_filesystems;
    let used = usage[0].used_bytes.map_or(0, |used| used.value);
    ensure!(used > 0 && usage.len() == 1, "{usage:?}");
    let both = status(node, more).await?.unwrap_or_default().id;
    removal_leaves_no_copy(host_pods, &both).await
}

/// Removes an image by id, as the kubelet's garbage collection.
async fn removal_leaves_no_copy(host_pods: &HostPodsNode, id: &str) -> Result {
    let (node, theirs) = (&host_pods.node, &host_pods.theirs);
    ensure!(
        status(theirs, id).await?.is_some(),
        "{id} is not in containerd's store"
    );
    let request = RemoveImageRequest {
        image: Some(spec(id)),
    };
    answer("RemoveImage", node.cri.image().remove_image(request).await)?;
    for (of, node) in [("both stores", &**node), ("containerd's store", theirs)] {
        same!(status(node, id).await?, None, "{id} of {of}");
    }
    Ok(())
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}

async fn status(node: &Node, image: &str) -> Result<Option<Image>> {
    let request = ImageStatusRequest {
        image: Some(spec(image)),
        verbose: false,
    };
    let status = node.cri.image().image_status(request).await;
    Ok(answer("ImageStatus", status)?.image)
}

/// One stream has the events of the containers of both sides, each with its pod.
async fn events_are_one(
    ctx: &Context,
    events: &mut Streaming<ContainerEventResponse>,
    containers: &[Container],
) -> Result {
    use ContainerEventType::*;
    let kinds = [
        ContainerCreatedEvent,
        ContainerStartedEvent,
        ContainerStoppedEvent,
    ];
    let mut missing: BTreeSet<_> = containers
        .iter()
        .flat_map(|c| kinds.map(|kind| (c.id.clone(), c.pod.id.clone(), kind as i32)))
        .collect();
    let reading = async {
        while !missing.is_empty() {
            let Some(event) = events.message().await? else {
                crate::bail!("the stream ended")
            };
            let pod = event.pod_sandbox_status.unwrap_or_default().id;
            missing.remove(&(event.container_id, pod, event.container_event_type));
        }
        Ok(())
    };
    let done = tokio::time::timeout(ctx.patience(20), reading).await;
    done.during(format!("missing events: {missing:?}"))?
}
