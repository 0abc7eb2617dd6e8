//! Statistics and metrics of both sides. While containerd is down, its pods have none.

use super::lookup::Side;
use super::{HostPods, Router};
use boxlite_proto::cri::v1::runtime_service_server::RuntimeService;
use boxlite_proto::cri::v1::*;
use std::sync::Arc;
use tonic::{Request, Status};

impl Router {
    /// Returns the statistics of the containers that `wanted` selects.
    pub(super) async fn container_stats_of(
        &self,
        wanted: Option<ContainerStatsFilter>,
    ) -> Result<Vec<ContainerStats>, Status> {
        let request = ListContainerStatsRequest { filter: wanted };
        let ours = self
            .server
            .list_container_stats(Request::new(request.clone()));
        let mut stats = ours.await?.into_inner().stats;
        let filter = request.filter.unwrap_or_default();
        let sides = [
            (!filter.id.is_empty()).then(|| self.container_side(&filter.id)),
            (!filter.pod_sandbox_id.is_empty()).then(|| self.pod_side(&filter.pod_sandbox_id)),
        ];
        if let Some(host) = self.host_for(sides) {
            let request = ListContainerStatsRequest {
                filter: Some(filter),
            };
            let mut runtime = host.client.runtime();
            let theirs = host.client.merged(runtime.list_container_stats(request));
            stats.extend(theirs.await.unwrap_or_default().stats);
        }
        Ok(stats)
    }

    /// Returns the statistics of the pods that `wanted` selects.
    pub(super) async fn pod_stats_of(
        &self,
        wanted: Option<PodSandboxStatsFilter>,
    ) -> Result<Vec<PodSandboxStats>, Status> {
        let request = ListPodSandboxStatsRequest { filter: wanted };
        let ours = self
            .server
            .list_pod_sandbox_stats(Request::new(request.clone()));
        let mut stats = ours.await?.into_inner().stats;
        let filter = request.filter.unwrap_or_default();
        let sides = [(!filter.id.is_empty()).then(|| self.pod_side(&filter.id))];
        if let Some(host) = self.host_for(sides) {
            let request = ListPodSandboxStatsRequest {
                filter: Some(filter),
            };
            let mut runtime = host.client.runtime();
            let theirs = host.client.merged(runtime.list_pod_sandbox_stats(request));
            stats.extend(theirs.await.unwrap_or_default().stats);
        }
        Ok(stats)
    }

    /// Returns the metrics of all pods. A containerd that does not implement the call has none.
    pub(super) async fn pod_metrics(&self) -> Result<Vec<PodSandboxMetrics>, Status> {
        let ours = self
            .server
            .list_pod_sandbox_metrics(Request::new(ListPodSandboxMetricsRequest {}));
        let mut metrics = ours.await?.into_inner().pod_metrics;
        if let Some(host) = &self.host {
            let mut runtime = host.client.runtime();
            let theirs = runtime.list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {});
            let theirs = host.client.merged(theirs).await;
            metrics.extend(theirs.unwrap_or_default().pod_metrics);
        }
        Ok(metrics)
    }

    /// Returns the descriptors of all metrics.
    pub(super) async fn descriptors(&self) -> Result<Vec<MetricDescriptor>, Status> {
        let ours = self
            .server
            .list_metric_descriptors(Request::new(ListMetricDescriptorsRequest {}));
        let mut descriptors = ours.await?.into_inner().descriptors;
        if let Some(host) = &self.host {
            let mut runtime = host.client.runtime();
            let theirs = runtime.list_metric_descriptors(ListMetricDescriptorsRequest {});
            let theirs = host.client.merged(theirs).await.unwrap_or_default();
            for descriptor in theirs.descriptors {
                if descriptors
                    .iter()
                    .all(|known| known.name != descriptor.name)
                {
                    descriptors.push(descriptor);
                }
            }
        }
        Ok(descriptors)
    }

    /// Returns containerd's side unless an id of the filter belongs to a VM or to nothing.
    fn host_for<const N: usize>(
        &self,
        sides: [Option<Result<Side, Status>>; N],
    ) -> Option<Arc<HostPods>> {
        let is_host = |side: Result<Side, Status>| matches!(side, Ok(Side::Host(..)));
        let all = sides.into_iter().flatten().all(is_host);
        self.host.clone().filter(|_| all)
    }
}
