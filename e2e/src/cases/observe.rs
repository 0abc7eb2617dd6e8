//! Observation and update of running pods: events, cAdvisor metrics, limits.

use crate::case;
use crate::client::{answer, status_failure, within};
use crate::event_stream;
use crate::failure::Result;
use crate::pod::{Container, LONG_TIMEOUT, Pod, container_spec, pod_spec, pull};
use crate::process::{family, rss};
use crate::runner::{Case, Context};
use crate::{ensure, poll, same};
use k8s_cri::v1::*;
use nix::sys::signal::{Signal as Kill, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::time::Duration;
use std::time::Instant;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case!(events_of_a_pod_arrive_in_order, 60),
        case!(events_continue_after_a_daemon_restart, 90),
        case!(metrics_of_a_pod_match_cadvisor, 60),
        case!(scrape_is_not_blocked_by_a_hung_vm, 120),
        case!(updated_limits_are_applied_and_kept, 90),
    ]
}

async fn events_of_a_pod_arrive_in_order(ctx: Context) -> Result {
    use ContainerEventType::*;
    let mut stream = event_stream::follow(&ctx.node).await?;
    // A subscriber that does not read must not delay the others.
    let _idle = event_stream::follow(&ctx.node).await?;
    let pod = Pod::run(&ctx.node, "events").await?;
    let c = pod
        .start("c", &ctx.images.base, &["sh", "-c", "exit 5"])
        .await?;
    c.exited(ctx.patience(20)).await?;
    c.remove().await?;
    pod.end().await?;
    let wanted = [
        (pod.id.as_str(), ContainerCreatedEvent),
        (pod.id.as_str(), ContainerStartedEvent),
        (c.id.as_str(), ContainerCreatedEvent),
        (c.id.as_str(), ContainerStartedEvent),
        (c.id.as_str(), ContainerStoppedEvent),
        (c.id.as_str(), ContainerDeletedEvent),
        (pod.id.as_str(), ContainerStoppedEvent),
        (pod.id.as_str(), ContainerDeletedEvent),
    ];
    let seen = event_stream::wait_for(&mut stream, &wanted, ctx.patience(10)).await?;
    let stopped = seen
        .iter()
        .find(|e| e.container_id == c.id && e.container_event_type() == ContainerStoppedEvent);
    let statuses = stopped.map(|e| e.containers_statuses.clone());
    same!(
        statuses.unwrap_or_default().first().map(|s| s.exit_code),
        Some(5),
        "exit code in the event"
    );
    ensure!(
        seen.iter().all(|e| e.pod_sandbox_status.is_some()),
        "an event without the pod's status"
    );
    Ok(())
}

async fn events_continue_after_a_daemon_restart(ctx: Context) -> Result {
    use ContainerEventType::*;
    let node = ctx.dedicated_node("oev", |_| {}).await?;
    pull(&node, &ctx.images.base).await?;
    let pod = Pod::run(&node, "gap").await?;
    let go = node.dir.join("go");
    let config = super::exits_on_signal_file(&ctx.images.base, &go, 9)?;
    let c = pod.start_with(config).await?;
    node.kill().await?;
    std::fs::write(go.join("now"), "")?;
    c.printed("bye", ctx.patience(20)).await?;
    node.serve().await?;
    let mut stream = event_stream::follow(&node).await?;
    let wanted = [(c.id.as_str(), ContainerStoppedEvent)];
    let seen = event_stream::wait_for(&mut stream, &wanted, ctx.patience(10)).await?;
    let code = seen
        .last()
        .and_then(|e| e.containers_statuses.first())
        .map(|s| s.exit_code);
    same!(
        code,
        Some(9),
        "exit code of a container that ended during downtime"
    );
    pod.end().await
}

async fn scrape(node: &crate::node::Node) -> Result<Vec<PodSandboxMetrics>> {
    let mut client = node.cri.runtime();
    Ok(answer(
        "ListPodSandboxMetrics",
        client
            .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})
            .await,
    )?
    .pod_metrics)
}

/// Returns true for metrics that need a feature which the guest's kernel lacks, or for which cgroup v2 has no file.
fn may_be_missing(name: &str) -> bool {
    [
        "container_pressure_",
        "container_hugetlb_",
        "container_blkio_",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
        || [
            "reads_total",
            "reads_bytes_total",
            "writes_total",
            "writes_bytes_total",
        ]
        .iter()
        .any(|end| name.starts_with("container_fs_") && name.ends_with(end))
}

async fn metrics_of_a_pod_match_cadvisor(ctx: Context) -> Result {
    let pod = Pod::run(&ctx.node, "cadvisor").await?;
    let mut config = container_spec("c", &ctx.images.base, &["sleep", "1000"]);
    let linux = config.linux.get_or_insert_default();
    linux.resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 20_000,
        cpu_shares: 1024,
        memory_limit_in_bytes: 64 << 20,
        ..Default::default()
    });
    let c = pod.start_with(config).await?;
    c.out(&["sh", "-c", "dd if=/dev/zero of=/file bs=1M count=3; sync"])
        .await?;
    let mut client = ctx.node.cri.runtime();
    let descriptors = answer(
        "ListMetricDescriptors",
        client
            .list_metric_descriptors(ListMetricDescriptorsRequest {})
            .await,
    )?
    .descriptors;
    same!(descriptors.len(), 56, "metrics described");
    let pods = scrape(&ctx.node).await?;
    let Some(own) = pods.iter().find(|p| p.pod_sandbox_id == pod.id) else {
        crate::bail!("the pod is not in the scrape")
    };
    let metrics: Vec<&Metric> = own
        .metrics
        .iter()
        .chain(own.container_metrics.iter().flat_map(|c| &c.metrics))
        .collect();
    let there: BTreeSet<&str> = metrics.iter().map(|m| m.name.as_str()).collect();
    let missing: Vec<&str> = descriptors
        .iter()
        .map(|d| d.name.as_str())
        .filter(|name| !there.contains(name) && !may_be_missing(name))
        .collect();
    ensure!(missing.is_empty(), "no value of {missing:?}");
    for metric in &metrics {
        let keys = descriptors.iter().find(|d| d.name == metric.name);
        same!(
            keys.map(|d| d.label_keys.len()),
            Some(metric.label_values.len()),
            "labels of {}",
            metric.name
        );
    }
    let value = |name: &str| {
        let container = own.container_metrics.first();
        let found = container.and_then(|c| c.metrics.iter().find(|m| m.name == name));
        found.and_then(|m| m.value).map_or(0, |v| v.value)
    };
    same!(
        value("container_spec_memory_limit_bytes"),
        64 << 20,
        "limit"
    );
    same!(value("container_spec_cpu_quota"), 20_000, "quota");
    same!(value("container_processes"), 1, "processes");
    ensure!(
        value("container_fs_usage_bytes") >= 3 << 20,
        "writable layer {}",
        value("container_fs_usage_bytes")
    );
    ensure!(
        value("container_file_descriptors") >= 3 && value("container_ulimits_soft") > 0,
        "descriptors {} of {}",
        value("container_file_descriptors"),
        value("container_ulimits_soft")
    );
    let interfaces: Vec<&str> = own
        .metrics
        .iter()
        .filter(|m| m.name == "container_network_receive_bytes_total")
        .filter_map(|m| m.label_values.last().map(String::as_str))
        .collect();
    same!(interfaces, ["eth0"], "interfaces");
    pod.end().await
}

async fn scrape_is_not_blocked_by_a_hung_vm(ctx: Context) -> Result {
    let well = Pod::run(&ctx.node, "well").await?;
    let hung = Pod::run(&ctx.node, "hung").await?;
    let both = [&well, &hung];
    for pod in both {
        pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    }
    let (_, below) = family(&hung.id)?;
    let Some(vm) = below.iter().copied().max_by_key(|&p| rss(p)) else {
        crate::bail!("the shim has no VMM child")
    };
    kill(Pid::from_raw(vm), Kill::SIGSTOP)?;
    let begun = Instant::now();
    let scraped = scrape(&ctx.node).await;
    let took = begun.elapsed();
    kill(Pid::from_raw(vm), Kill::SIGCONT)?;
    let ids: Vec<_> = scraped?.into_iter().map(|p| p.pod_sandbox_id).collect();
    ensure!(
        ids.contains(&well.id) && !ids.contains(&hung.id),
        "scraped {ids:?}; {} hangs",
        hung.id
    );
    // The time limit per VM is 2 s.
    ensure!(took < Duration::from_secs(3), "the scrape took {took:?}");
    for pod in both {
        pod.end().await?;
    }
    Ok(())
}

async fn update(c: &Container, memory_mib: i64) -> std::result::Result<(), tonic::Status> {
    let request = UpdateContainerResourcesRequest {
        container_id: c.id.clone(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: memory_mib << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut client = c.pod.node.cri.runtime();
    let answer = client
        .update_container_resources(within(LONG_TIMEOUT, request))
        .await;
    answer.map(drop)
}

async fn updated_limits_are_applied_and_kept(ctx: Context) -> Result {
    let node = ctx.dedicated_node("olim", |_| {}).await?;
    pull(&node, &ctx.images.base).await?;
    let pod = Pod::run_with(&node, pod_spec(&node, "limits")).await?;
    let c = pod.start("c", &ctx.images.base, &["sleep", "1000"]).await?;
    let in_guest = || c.out(&["cat", "/sys/fs/cgroup/memory.max"]);
    update(&c, 96).await.map_err(|s| status_failure(&s))?;
    let now = in_guest().await?;
    same!(now.trim(), (96 << 20).to_string(), "in the guest");
    // Beyond the VM its capacity applies, since an error would make a kubelet ask again and again.
    update(&c, 4096).await.map_err(|s| status_failure(&s))?;
    let now = in_guest().await?;
    same!(now.trim(), (2048_u64 << 20).to_string(), "beyond the VM");
    let reported = c.status().await?.resources.unwrap_or_default();
    same!(
        reported.linux.map(|l| l.memory_limit_in_bytes),
        Some(2048 << 20),
        "reported beyond the VM"
    );
    update(&c, 96).await.map_err(|s| status_failure(&s))?;
    // Limits of the whole pod.
    let request = UpdatePod {
        pod_sandbox_id: pod.id.clone(),
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        }),
    };
    let done: Empty = node
        .cri
        .raw("UpdatePodSandboxResources", request)
        .await
        .map_err(|s| status_failure(&s))?;
    same!(done, Empty {}, "answer");
    node.kill().await?;
    node.serve().await?;
    let reported = c.status().await?.resources.unwrap_or_default();
    same!(
        reported.linux.map(|l| l.memory_limit_in_bytes),
        Some(96 << 20),
        "reported after the daemon's death"
    );
    poll::until("the guest answers again", ctx.patience(20), in_guest).await?;
    let now = in_guest().await?;
    same!(now.trim(), (96 << 20).to_string(), "in the guest");
    let stats = PodSandboxStatsRequest {
        pod_sandbox_id: pod.id.clone(),
    };
    let mut client = node.cri.runtime();
    let stats = answer("PodSandboxStats", client.pod_sandbox_stats(stats).await)?;
    let memory = stats
        .stats
        .and_then(|s| s.linux?.memory)
        .unwrap_or_default();
    let room = memory.available_bytes.map_or(0, |v| v.value);
    ensure!(
        room > 0 && room <= 128 << 20,
        "the pod has {room} bytes left of 128 MiB"
    );
    pod.end().await
}

/// UpdatePodSandboxResourcesRequest, which k8s-cri does not define.
#[derive(Clone, PartialEq, prost::Message)]
struct UpdatePod {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
    #[prost(message, optional, tag = "3")]
    resources: Option<LinuxContainerResources>,
}

/// An empty message.
#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}
