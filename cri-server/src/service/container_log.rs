//! ReopenContainerLog: after the kubelet renamed the file.

use super::{Server, refused};
use boxlite_proto::cri::v1::{ReopenContainerLogRequest, ReopenContainerLogResponse};
use tonic::Status;

/// The call. Only a running container has an open log.
pub async fn reopen(
    server: &Server,
    request: ReopenContainerLogRequest,
) -> Result<ReopenContainerLogResponse, Status> {
    let (pod, container) = server.running_container(&request.container_id)?;
    let work = async move { pod.reopen_log(&container.id).await.map_err(refused) };
    server.detached(work).await?;
    Ok(ReopenContainerLogResponse {})
}
