//! RunPodSandbox and CreateContainer: the calls that create ids. A host pod's id is in the table before it is answered, and
//! the work continues, for a limited time, if the client disconnects, so that no id is lost.

use super::lookup::Side;
use super::rules::Rule;
use super::table::HostPod;
use super::{HostPods, Router};
use crate::convert::time;
use boxlite_proto::cri::v1::runtime_service_server::RuntimeService;
use boxlite_proto::cri::v1::{
    Container, CreateContainerRequest, CreateContainerResponse, PodSandbox, RunPodSandboxRequest,
    RunPodSandboxResponse,
};
use std::sync::Arc;
use tonic::{Request, Response, Status};

impl Router {
    /// Handles RunPodSandbox.
    pub(super) async fn run_pod(
        &self,
        request: RunPodSandboxRequest,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        let config = request.config.clone().unwrap_or_default();
        let host = self.host.as_ref().and_then(|host| {
            let rule = host.rules.select(&config, &request.runtime_handler)?;
            Some((host.clone(), rule))
        });
        match host {
            None => self.server.run_pod_sandbox(Request::new(request)).await,
            Some((host, rule)) => {
                let work = async move { host.run_pod(request, rule).await };
                self.server.run_detached(work).await
            }
        }
    }

    /// Handles CreateContainer.
    pub(super) async fn create(
        &self,
        mut request: CreateContainerRequest,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        if self.host.is_none() {
            return self.server.create_container(Request::new(request)).await;
        }
        let side = self.pod_side(&request.pod_sandbox_id)?;
        let router = self.clone();
        let work = async move {
            router.provide_images(&side, &mut request).await?;
            match side {
                Side::Vm => router.server.create_container(Request::new(request)).await,
                Side::Host(host, id) => {
                    request.pod_sandbox_id = id;
                    host.create(request).await
                }
            }
        };
        self.server.run_detached(work).await
    }
}

impl HostPods {
    async fn run_pod(
        self: Arc<Self>,
        request: RunPodSandboxRequest,
        rule: Rule,
    ) -> Result<Response<RunPodSandboxResponse>, Status> {
        let config = request.config.clone().unwrap_or_default();
        let runtime_handler = request.runtime_handler.clone();
        let mut runtime = self.client.runtime();
        let answer = runtime.run_pod_sandbox(request);
        let answer = self.client.within(self.limits.run, answer).await?;
        let pod = PodSandbox {
            id: answer.get_ref().pod_sandbox_id.clone(),
            metadata: config.metadata,
            created_at: time::now_ns(),
            labels: config.labels,
            annotations: config.annotations,
            runtime_handler,
            ..Default::default()
        };
        let rule = rule.to_string();
        self.table.add_pod(pod.clone(), rule.clone());
        let pod = Some(pod);
        self.log_pod(&HostPod { pod, rule });
        Ok(answer)
    }

    async fn create(
        self: Arc<Self>,
        request: CreateContainerRequest,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let config = request.config.clone().unwrap_or_default();
        let pod_sandbox_id = request.pod_sandbox_id.clone();
        let mut runtime = self.client.runtime();
        let answer = runtime.create_container(request);
        let answer = self.client.within(self.limits.run, answer).await?;
        self.table.add_container(Container {
            id: answer.get_ref().container_id.clone(),
            pod_sandbox_id,
            metadata: config.metadata,
            image_ref: config.image.clone().unwrap_or_default().image,
            image: config.image,
            created_at: time::now_ns(),
            labels: config.labels,
            annotations: config.annotations,
            ..Default::default()
        });
        Ok(answer)
    }
}
