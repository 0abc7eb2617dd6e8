//! UpdatePodSandboxResources: applies new limits to all containers of a pod together, lowered to the VM's capacity and
//! unless a plugin rejects them, and stores the applied ones with the pod.

use super::error::ServiceError;
use super::{Server, capacity, nri_hooks, status_of};
use crate::convert::sandbox::PodMetadata;
use crate::convert::{ConvertError, spec};
use boxlite_proto::cri::v1::{
    LinuxContainerResources, UpdatePodSandboxResourcesRequest, UpdatePodSandboxResourcesResponse,
};
use boxlite_proto::nri::v1alpha1::Event;
use boxlite_runtime::BoxState;
use tonic::Status;

/// Handles UpdatePodSandboxResources. Fails for a pod that is not ready.
pub(crate) async fn update(
    server: &Server,
    request: UpdatePodSandboxResourcesRequest,
) -> Result<UpdatePodSandboxResourcesResponse, Status> {
    let pod = server.pod(&request.pod_sandbox_id)?;
    let UpdatePodSandboxResourcesRequest {
        overhead,
        resources,
        ..
    } = request;
    if overhead.is_none() && resources.is_none() {
        return Err(ConvertError::Missing("resources or overhead").into());
    }
    let state = pod.snapshot().state;
    if state != BoxState::Ready {
        let id = pod.id().to_owned();
        return Err(ServiceError::PodNotReady { id, state }.into());
    }
    let capacity = capacity::of_pod(server, &pod);
    let resources = resources.map(|requested| capacity.cap(pod.id(), requested, None));
    let of_the_pod = of_the_whole(&resources.clone().unwrap_or_default());
    let limits = spec::resources(Some(&of_the_pod))?;
    let task = server.clone();
    let work = async move {
        let session = task.session().await;
        let (of_all, above) = (resources.as_ref(), overhead.as_ref());
        nri_hooks::update_pod(&task, &session, &pod, of_all, above).await?;
        let describe = Box::new(move |bytes: &[u8]| {
            PodMetadata::updated(bytes, resources.as_ref(), overhead.as_ref())
        });
        pod.update_limits(limits.to_string().into_bytes(), describe)
            .await
            .map_err(status_of)?;
        nri_hooks::notify_pod(&task, &session, Event::PostUpdatePodSandbox, &pod).await;
        Ok(UpdatePodSandboxResourcesResponse {})
    };
    server.run_detached(work).await
}

/// Returns the limits that apply to the pod as a whole. Shares weigh pods against each other, and a pod is alone in
/// its VM.
fn of_the_whole(limits: &LinuxContainerResources) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_quota: limits.cpu_quota,
        cpu_period: limits.cpu_period,
        memory_limit_in_bytes: limits.memory_limit_in_bytes,
        ..Default::default()
    }
}
