//! RemoveContainer: kills what still runs. Succeeds on what is gone.

use super::{Server, present, refused, unless_gone};
use boxlite_proto::cri::v1::{RemoveContainerRequest, RemoveContainerResponse};
use tonic::Status;

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
        pod.remove_container(&container.id).await.map_err(refused)?;
        task.creates.forget(&container.id);
        Ok(RemoveContainerResponse {})
    };
    server.detached(work).await
}
