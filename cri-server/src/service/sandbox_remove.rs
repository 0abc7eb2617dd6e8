//! RemovePodSandbox: stops the pod if it runs and removes everything of it. Succeeds if it does not exist.

use super::error::ServiceError;
use super::{Server, nri_hooks, pod_files, sandbox_stop, status_of};
use boxlite_proto::cri::v1::{RemovePodSandboxRequest, RemovePodSandboxResponse};
use tonic::Status;

/// Handles RemovePodSandbox.
pub(crate) async fn remove(
    server: &Server,
    request: RemovePodSandboxRequest,
) -> Result<RemovePodSandboxResponse, Status> {
    let Some(pod) = server.pod_if_any(&request.pod_sandbox_id)? else {
        return Ok(RemovePodSandboxResponse {});
    };
    let task = server.clone();
    let work = async move {
        let id = pod.id().to_owned();
        let containers = pod.containers();
        sandbox_stop::tear_down(&task, &pod).await?;
        let session = task.session().await;
        nri_hooks::remove_pod(&task, &session, &pod).await;
        // The box is removed last: until everything else is removed, the pod is listed and Remove can be repeated.
        pod_files::remove(&task.layout, &id).map_err(|source| ServiceError::PodFiles {
            operation: "remove",
            id: id.clone(),
            path: task.layout.pod(&id),
            source,
        })?;
        pod.remove().await.map_err(status_of)?;
        for container in containers {
            task.creates.forget(&container.id);
            task.starts.forget(&container.id);
            session.forget(&container.id);
        }
        session.forget(&id);
        Ok(RemovePodSandboxResponse {})
    };
    server.run_detached(work).await
}
