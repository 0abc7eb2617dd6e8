//! The `Container` service: containers of the pod.

use crate::agent::Agent;
use crate::cgroup::{processes, resources, stats};
use crate::container::error::ContainerError;
use crate::status::joined;
use crate::steps::Steps;
use crate::system;
use boxlite_proto::boxlite::v1::container_server::Container;
use boxlite_proto::boxlite::v1::{
    ContainerDeleteRequest, ContainerDeleteResponse, ContainerEvent, ContainerEventsRequest,
    ContainerInitRequest, ContainerInitResponse, ContainerKillRequest, ContainerKillResponse,
    ContainerListRequest, ContainerListResponse, ContainerPauseRequest, ContainerPauseResponse,
    ContainerPidsRequest, ContainerPidsResponse, ContainerResumeRequest, ContainerResumeResponse,
    ContainerStartRequest, ContainerStartResponse, ContainerStatsRequest, ContainerStatsResponse,
    ContainerUpdateRequest, ContainerUpdateResponse, StepKind,
};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

/// Implementation of the `Container` service.
#[derive(Debug)]
pub(crate) struct ContainerService {
    agent: Arc<Agent>,
}

impl ContainerService {
    /// Creates the service of `agent`.
    pub(crate) fn new(agent: Arc<Agent>) -> Self {
        Self { agent }
    }

    async fn find(&self, id: &str) -> Result<Arc<crate::container::Container>, Status> {
        Ok(self.agent.pod.get(id).await?)
    }
}

#[tonic::async_trait]
impl Container for ContainerService {
    async fn init(
        &self,
        request: Request<ContainerInitRequest>,
    ) -> Result<Response<ContainerInitResponse>, Status> {
        if !self.agent.is_initialized() {
            return Err(ContainerError::NoPod.into());
        }
        let request = request.into_inner();
        let trace = request.trace;
        let container = self.agent.pod.init(request).await?;
        Ok(Response::new(ContainerInitResponse {
            pid: container.init.pid.unsigned_abs(),
            steps: match trace {
                true => container.creation.report(),
                false => Vec::new(),
            },
        }))
    }

    async fn start(
        &self,
        request: Request<ContainerStartRequest>,
    ) -> Result<Response<ContainerStartResponse>, Status> {
        let request = request.into_inner();
        let container = self.find(&request.container_id).await?;
        let mut steps = Steps::default();
        let begun = Instant::now();
        container.start().await?;
        if request.trace {
            steps.add(StepKind::Start, begun, Instant::now());
        }
        Ok(Response::new(ContainerStartResponse {
            pid: container.init.pid.unsigned_abs(),
            steps: steps.report(),
        }))
    }

    async fn kill(
        &self,
        request: Request<ContainerKillRequest>,
    ) -> Result<Response<ContainerKillResponse>, Status> {
        let request = request.into_inner();
        self.find(&request.container_id)
            .await?
            .kill(request.signal, request.all)?;
        Ok(Response::new(ContainerKillResponse {}))
    }

    async fn delete(
        &self,
        request: Request<ContainerDeleteRequest>,
    ) -> Result<Response<ContainerDeleteResponse>, Status> {
        let request = request.into_inner();
        self.agent
            .pod
            .delete(&request.container_id, request.force)
            .await?;
        Ok(Response::new(ContainerDeleteResponse {}))
    }

    async fn update(
        &self,
        request: Request<ContainerUpdateRequest>,
    ) -> Result<Response<ContainerUpdateResponse>, Status> {
        let request = request.into_inner();
        let container = self.find(&request.container_id).await?;
        let limits = serde_json::from_slice(&request.resources_json).map_err(|error| {
            ContainerError::Invalid {
                field: "resources_json",
                reason: error.to_string(),
            }
        })?;
        resources::apply(&container.cgroup, &limits).map_err(ContainerError::from)?;
        Ok(Response::new(ContainerUpdateResponse {}))
    }

    async fn pause(
        &self,
        request: Request<ContainerPauseRequest>,
    ) -> Result<Response<ContainerPauseResponse>, Status> {
        self.find(&request.into_inner().container_id)
            .await?
            .pause(true)?;
        Ok(Response::new(ContainerPauseResponse {}))
    }

    async fn resume(
        &self,
        request: Request<ContainerResumeRequest>,
    ) -> Result<Response<ContainerResumeResponse>, Status> {
        self.find(&request.into_inner().container_id)
            .await?
            .pause(false)?;
        Ok(Response::new(ContainerResumeResponse {}))
    }

    async fn stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Result<Response<ContainerStatsResponse>, Status> {
        let request = request.into_inner();
        let container = self.find(&request.container_id).await?;
        let figures = stats::read(&container.cgroup);
        container.emit_oom(&self.agent.pod.context, figures.memory_events_oom_kill);
        let look = move || {
            let inside = request
                .processes
                .then(|| processes::inspect(&container.cgroup, container.init.pid));
            (container.upper_usage(), inside)
        };
        let (upper, inside) = joined(tokio::task::spawn_blocking(look)).await?;
        Ok(Response::new(ContainerStatsResponse {
            time_unix_ns: system::unix_time_ns(),
            cgroup: Some(figures),
            upper_bytes: upper.bytes,
            upper_inodes: upper.inodes,
            processes: inside,
        }))
    }

    async fn pids(
        &self,
        request: Request<ContainerPidsRequest>,
    ) -> Result<Response<ContainerPidsResponse>, Status> {
        let container = self.find(&request.into_inner().container_id).await?;
        let pids = container
            .cgroup
            .processes()
            .into_iter()
            .map(i32::unsigned_abs)
            .collect();
        Ok(Response::new(ContainerPidsResponse { pids }))
    }

    async fn list(
        &self,
        request: Request<ContainerListRequest>,
    ) -> Result<Response<ContainerListResponse>, Status> {
        let id = request.into_inner().container_id;
        let mut containers: Vec<_> = self
            .agent
            .pod
            .list()
            .into_iter()
            .filter(|container| id.is_empty() || container.id == id)
            .map(|container| container.info())
            .collect();
        containers.sort_by(|one, other| one.container_id.cmp(&other.container_id));
        Ok(Response::new(ContainerListResponse { containers }))
    }

    type EventsStream = Pin<Box<dyn Stream<Item = Result<ContainerEvent, Status>> + Send>>;

    async fn events(
        &self,
        request: Request<ContainerEventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let pod = Arc::clone(&self.agent.pod);
        let stream =
            futures::stream::unfold((pod, request.into_inner().from), |(pod, from)| async move {
                let event = pod.context.events.next(from).await;
                let next = event.sequence + 1;
                Some((Ok(event), (pod, next)))
            });
        Ok(Response::new(Box::pin(stream)))
    }
}
