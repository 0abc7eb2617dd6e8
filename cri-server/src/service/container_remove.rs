//! RemoveContainer: kills what still runs. Succeeds on what is gone.

use super::{Server, plugins, present, refused, unless_gone};
use boxlite_proto::cri::v1::{RemoveContainerRequest, RemoveContainerResponse};
use std::time::Duration;
use tonic::Status;

const SIGKILL: i32 = 9;

/// The call.
pub async fn remove(
    server: &Server,
    request: RemoveContainerRequest,
) -> Result<RemoveContainerResponse, Status> {
    present("container_id", &request.container_id)?;
    let Some((pod, container)) = unless_gone(server.runtime.find_container(&request.container_id))?
    else {
        return Ok(RemoveContainerResponse {});
    };
    let task = server.clone();
    let work = async move {
        // Ended first, so that plugins hear of its end and of its removal in this order.
        let ended = pod
            .stop_container(&container.id, Duration::ZERO, SIGKILL)
            .await;
        unless_gone(ended)?;
        plugins::container_ended(&task, &pod, &container.id).await;
        let session = task.session().await;
        if let Ok(container) = pod.container(&container.id) {
            plugins::remove(&task, &session, &pod, &container).await;
        }
        pod.remove_container(&container.id).await.map_err(refused)?;
        session.forget(&container.id);
        task.creates.forget(&container.id);
        Ok(RemoveContainerResponse {})
    };
    server.detached(work).await
}
