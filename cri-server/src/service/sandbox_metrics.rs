//! ListMetricDescriptors, ListPodSandboxMetrics and StreamPodSandboxMetrics. Each guest has a deadline; a list omits
//! guests that miss it, so that they do not delay others.

use super::Server;
use crate::convert::{metrics, time};
use boxlite_proto::boxlite::v1::{ContainerStatsResponse, GuestStatsResponse};
use boxlite_proto::cri::v1::{ListMetricDescriptorsResponse, PodSandboxMetrics};
use boxlite_runtime::{BoxState, ContainerSnapshot, ContainerState, LiteBox};
use std::time::Duration;

/// Returns the descriptors of all metrics.
pub(crate) fn descriptors() -> ListMetricDescriptorsResponse {
    ListMetricDescriptorsResponse {
        descriptors: metrics::descriptors(),
    }
}

/// Returns the metrics of all ready pods whose guest answers within the deadline.
pub(crate) async fn list(server: &Server) -> Vec<PodSandboxMetrics> {
    let limit = server.config.timeouts.stats;
    let asked = server
        .runtime
        .handles()
        .into_iter()
        .filter(|pod| pod.snapshot().state == BoxState::Ready)
        .map(|pod| async move { one(&pod, limit).await });
    let answered = futures::future::join_all(asked).await;
    answered.into_iter().flatten().collect()
}

/// Queries the pod and its containers concurrently; omits containers without an answer.
async fn one(pod: &LiteBox, limit: Duration) -> Option<PodSandboxMetrics> {
    let containers = pod
        .containers()
        .into_iter()
        .filter(|container| container.state == ContainerState::Running)
        .map(|container| async move {
            let asked = pod.container_stats(&container.id, true);
            let answer = tokio::time::timeout(limit, asked).await.ok()?.ok()?;
            Some((container, answer))
        });
    let (answer, containers) = tokio::join!(
        tokio::time::timeout(limit, pod.stats()),
        futures::future::join_all(containers)
    );
    let containers: Vec<_> = containers.into_iter().flatten().collect();
    Some(metrics_of(pod, &answer.ok()?.ok()?, &containers))
}

fn metrics_of(
    pod: &LiteBox,
    answer: &GuestStatsResponse,
    containers: &[(ContainerSnapshot, ContainerStatsResponse)],
) -> PodSandboxMetrics {
    let (snapshot, now) = (pod.snapshot(), time::now_ns());
    let scratch = answer.scratch.as_ref();
    let containers = containers
        .iter()
        .map(|(container, stats)| metrics::container(&snapshot, container, stats, scratch, now))
        .collect();
    metrics::pod(&snapshot, answer, containers, now)
}
