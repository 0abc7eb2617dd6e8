//! RemoveContainer: kills the container if it runs. Succeeds if it does not exist.

use super::{Server, none_if_not_found, nri_hooks, require, status_of};
use boxlite_proto::cri::v1::{RemoveContainerRequest, RemoveContainerResponse};
use std::time::Duration;
use tonic::Status;

const SIGKILL: i32 = 9;

/// Handles RemoveContainer.
pub(crate) async fn remove(
    server: &Server,
    request: RemoveContainerRequest,
) -> Result<RemoveContainerResponse, Status> {
    require("container_id", &request.container_id)?;
    let Some((pod, container)) = none_if_not_found(server.find_container(&request.container_id))?
    else {
        return Ok(RemoveContainerResponse {});
    };
    let task = server.clone();
    let work = async move {
        // Stopped first, so that plugins get StopContainer before RemoveContainer.
        let ended = pod
            .stop_container(&container.id, Duration::ZERO, SIGKILL)
            .await;
        none_if_not_found(ended)?;
        nri_hooks::container_ended(&task, &pod, &container.id).await;
        let session = task.session().await;
        if let Ok(container) = pod.container(&container.id) {
            nri_hooks::remove(&task, &session, &pod, &container).await;
        }
        pod.remove_container(&container.id)
            .await
            .map_err(status_of)?;
        session.forget(&container.id);
        task.creates.forget(&container.id);
        task.starts.forget(&container.id);
        Ok(RemoveContainerResponse {})
    };
    server.run_detached(work).await
}
