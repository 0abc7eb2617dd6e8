//! StartContainer.

use super::{Server, present, refused};
use boxlite_proto::cri::v1::{StartContainerRequest, StartContainerResponse};
use tonic::Status;

/// The call.
pub async fn start(
    server: &Server,
    request: StartContainerRequest,
) -> Result<StartContainerResponse, Status> {
    present("container_id", &request.container_id)?;
    let (pod, container) = server
        .runtime
        .find_container(&request.container_id)
        .map_err(refused)?;
    let work = async move { pod.start_container(&container.id).await.map_err(refused) };
    server.detached(work).await?;
    Ok(StartContainerResponse {})
}
