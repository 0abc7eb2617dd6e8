//! ListMetricDescriptors, ListPodSandboxMetrics and StreamPodSandboxMetrics. Each guest has a deadline; one that does not answer is
//! left out, and holds nobody else up.

use super::Server;
use crate::convert::{metrics, time};
use boxlite_proto::boxlite::v1::{ContainerStatsResponse, GuestStatsResponse};
use boxlite_proto::cri::v1::{ListMetricDescriptorsResponse, PodSandboxMetrics};
use boxlite_runtime::{BoxState, ContainerSnapshot, ContainerState, LiteBox};
use std::time::Duration;

/// What metrics there are.
pub fn descriptors() -> ListMetricDescriptorsResponse {
    ListMetricDescriptorsResponse {
        descriptors: metrics::descriptors(),
    }
}

/// Those of all pods that are ready and answer, each within the limit of one guest.
pub async fn list(server: &Server) -> Vec<PodSandboxMetrics> {
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

/// The pod and its containers are asked side by side; a container that does not answer is left out.
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
