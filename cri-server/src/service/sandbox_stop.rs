//! StopPodSandbox: notifies plugins, shuts down the VM and detaches the network. Succeeds if the pod is stopped or does not
//! exist.

use super::error::ServiceError;
use super::{Server, nri_hooks, status_of};
use boxlite_proto::cri::v1::{StopPodSandboxRequest, StopPodSandboxResponse};
use boxlite_runtime::LiteBox;
use tonic::Status;

/// Handles StopPodSandbox.
pub(crate) async fn stop(
    server: &Server,
    request: StopPodSandboxRequest,
) -> Result<StopPodSandboxResponse, Status> {
    let Some(pod) = server.pod_if_any(&request.pod_sandbox_id)? else {
        return Ok(StopPodSandboxResponse {});
    };
    let task = server.clone();
    server
        .run_detached(async move { tear_down(&task, &pod).await })
        .await?;
    Ok(StopPodSandboxResponse {})
}

/// Stops the VM and detaches the network; idempotent.
pub(crate) async fn tear_down(server: &Server, pod: &LiteBox) -> Result<(), Status> {
    server.runs.forget(pod.id());
    nri_hooks::stop_pod(server, pod).await;
    // The CNI plugins take as long as the VM, and neither needs the other to have ended.
    let mut stopped = Ok(());
    let ended = async {
        stopped = pod.stop().await;
        stopped.is_ok()
    };
    let detached = server.cni.detach_while(pod.id(), ended).await;
    stopped.map_err(status_of)?;
    detached.map_err(ServiceError::network("remove", pod.id()))?;
    Ok(())
}
