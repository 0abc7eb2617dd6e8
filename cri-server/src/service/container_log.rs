//! ReopenContainerLog: after the kubelet renamed the file.

use super::{Server, present, refused};
use boxlite_proto::cri::v1::{ReopenContainerLogRequest, ReopenContainerLogResponse};
use boxlite_runtime::ContainerState;
use tonic::Status;

/// The call. Only a running container has an open log.
pub async fn reopen(
    server: &Server,
    request: ReopenContainerLogRequest,
) -> Result<ReopenContainerLogResponse, Status> {
    present("container_id", &request.container_id)?;
    let (pod, container) = server
        .runtime
        .find_container(&request.container_id)
        .map_err(refused)?;
    if container.state != ContainerState::Running {
        return Err(Status::failed_precondition(format!(
            "container {} is {}: it has no open log",
            container.id, container.state
        )));
    }
    let work = async move { pod.reopen_log(&container.id).await.map_err(refused) };
    server.detached(work).await?;
    Ok(ReopenContainerLogResponse {})
}
