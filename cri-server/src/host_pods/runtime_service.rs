//! The RuntimeService of both sides: each call goes to the side that has the id, or to the file that merges both.

use super::Router;
use super::lookup::Side;
use crate::service::streams::{Stream, batches};
use boxlite_proto::cri::v1::runtime_service_server::RuntimeService;
use boxlite_proto::cri::v1::*;
use tonic::{Request, Response, Status};

/// Passes a call on to the side that has the pod or the container, with its complete id.
macro_rules! pass_on {
    ($router:ident.$side:ident, $request:ident.$id:ident, $call:ident) => {{
        let side = $router.$side(&$request.get_ref().$id)?;
        pass_on!($router, side, $request.$id, $call)
    }};
    ($router:ident, $side:expr, $request:ident.$id:ident, $call:ident) => {
        match $side {
            Side::Vm => $router.server.$call($request).await,
            Side::Host(host, id) => {
                let mut message = $request.into_inner();
                message.$id = id;
                host.client
                    .checked(host.client.runtime().$call(message).await)
            }
        }
    };
}

#[tonic::async_trait]
impl RuntimeService for Router {
    async fn version(
        &self,
        request: Request<VersionRequest>,
    ) -> Result<Response<VersionResponse>, Status> {
        self.server.version(request).await
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<RunPodSandboxRequest>,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        self.run_pod(request.into_inner()).await
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Result<Response<RemovePodSandboxResponse>, Status> {
        let side = self.pod_side(&request.get_ref().pod_sandbox_id)?;
        let answer = pass_on!(
            self,
            side.clone(),
            request.pod_sandbox_id,
            remove_pod_sandbox
        )?;
        if let Side::Host(host, id) = side {
            host.table.remove_pod(&id);
        }
        Ok(answer)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Result<Response<ListPodSandboxResponse>, Status> {
        let items = self.pods(request.into_inner().filter).await;
        Ok(Response::new(ListPodSandboxResponse { items }))
    }

    type StreamPodSandboxesStream = Stream<StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let pods = self.pods(request.into_inner().filter).await;
        Ok(batches(pods, |pod_sandboxes| StreamPodSandboxesResponse {
            pod_sandboxes,
        }))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        self.create(request.into_inner()).await
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        let side = self.container_side(&request.get_ref().container_id)?;
        let answer = pass_on!(self, side.clone(), request.container_id, remove_container)?;
        if let Side::Host(host, id) = side {
            host.table.remove_container(&id);
        }
        Ok(answer)
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let containers = self.containers(request.into_inner().filter).await;
        Ok(Response::new(ListContainersResponse { containers }))
    }

    type StreamContainersStream = Stream<StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let containers = self.containers(request.into_inner().filter).await;
        Ok(batches(containers, |containers| StreamContainersResponse {
            containers,
        }))
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Result<Response<ListContainerStatsResponse>, Status> {
        let stats = self.container_stats_of(request.into_inner().filter).await?;
        Ok(Response::new(ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Stream<StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let stats = self.container_stats_of(request.into_inner().filter).await?;
        Ok(batches(stats, |container_stats| {
            StreamContainerStatsResponse { container_stats }
        }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Result<Response<ListPodSandboxStatsResponse>, Status> {
        let stats = self.pod_stats_of(request.into_inner().filter).await?;
        Ok(Response::new(ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Stream<StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let stats = self.pod_stats_of(request.into_inner().filter).await?;
        Ok(batches(stats, |pod_sandbox_stats| {
            StreamPodSandboxStatsResponse { pod_sandbox_stats }
        }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<UpdateRuntimeConfigRequest>,
    ) -> Result<Response<UpdateRuntimeConfigResponse>, Status> {
        self.update_node_config(request.into_inner()).await
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        self.node_status(request.into_inner()).await
    }

    async fn restore_pod(
        &self,
        request: Request<RestorePodRequest>,
    ) -> Result<Response<RestorePodResponse>, Status> {
        self.server.restore_pod(request).await
    }

    type GetContainerEventsStream = Stream<ContainerEventResponse>;

    async fn get_container_events(
        &self,
        request: Request<GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        self.events(request).await
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Result<Response<ListMetricDescriptorsResponse>, Status> {
        let descriptors = self.descriptors().await?;
        Ok(Response::new(ListMetricDescriptorsResponse { descriptors }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Result<Response<ListPodSandboxMetricsResponse>, Status> {
        let pod_metrics = self.pod_metrics().await?;
        Ok(Response::new(ListPodSandboxMetricsResponse { pod_metrics }))
    }

    type StreamPodSandboxMetricsStream = Stream<StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let metrics = self.pod_metrics().await?;
        Ok(batches(metrics, |pod_sandbox_metrics| {
            StreamPodSandboxMetricsResponse {
                pod_sandbox_metrics,
            }
        }))
    }

    async fn runtime_config(
        &self,
        _: Request<RuntimeConfigRequest>,
    ) -> Result<Response<RuntimeConfigResponse>, Status> {
        self.node_config().await
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Result<Response<StopPodSandboxResponse>, Status> {
        pass_on!(self.pod_side, request.pod_sandbox_id, stop_pod_sandbox)
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Result<Response<PodSandboxStatusResponse>, Status> {
        pass_on!(self.pod_side, request.pod_sandbox_id, pod_sandbox_status)
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Result<Response<PortForwardResponse>, Status> {
        pass_on!(self.pod_side, request.pod_sandbox_id, port_forward)
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Result<Response<PodSandboxStatsResponse>, Status> {
        pass_on!(self.pod_side, request.pod_sandbox_id, pod_sandbox_stats)
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<UpdatePodSandboxResourcesResponse>, Status> {
        pass_on!(
            self.pod_side,
            request.pod_sandbox_id,
            update_pod_sandbox_resources
        )
    }

    async fn checkpoint_pod(
        &self,
        request: Request<CheckpointPodRequest>,
    ) -> Result<Response<CheckpointPodResponse>, Status> {
        pass_on!(self.pod_side, request.pod_sandbox_id, checkpoint_pod)
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        pass_on!(self.container_side, request.container_id, start_container)
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        pass_on!(self.container_side, request.container_id, stop_container)
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Result<Response<ContainerStatusResponse>, Status> {
        pass_on!(self.container_side, request.container_id, container_status)
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Result<Response<UpdateContainerResourcesResponse>, Status> {
        pass_on!(
            self.container_side,
            request.container_id,
            update_container_resources
        )
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Result<Response<ReopenContainerLogResponse>, Status> {
        pass_on!(
            self.container_side,
            request.container_id,
            reopen_container_log
        )
    }

    async fn exec_sync(
        &self,
        request: Request<ExecSyncRequest>,
    ) -> Result<Response<ExecSyncResponse>, Status> {
        pass_on!(self.container_side, request.container_id, exec_sync)
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        pass_on!(self.container_side, request.container_id, exec)
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<AttachResponse>, Status> {
        pass_on!(self.container_side, request.container_id, attach)
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Result<Response<ContainerStatsResponse>, Status> {
        pass_on!(self.container_side, request.container_id, container_stats)
    }

    async fn checkpoint_container(
        &self,
        request: Request<CheckpointContainerRequest>,
    ) -> Result<Response<CheckpointContainerResponse>, Status> {
        pass_on!(
            self.container_side,
            request.container_id,
            checkpoint_container
        )
    }
}
