//! ReopenContainerLog: after the kubelet renamed the file.

use super::{Server, status_of};
use boxlite_proto::cri::v1::{ReopenContainerLogRequest, ReopenContainerLogResponse};
use tonic::Status;

/// The call. Only a running container has an open log.
pub async fn reopen(
    server: &Server,
    request: ReopenContainerLogRequest,
) -> Result<ReopenContainerLogResponse, Status> {
    let (pod, container) = server.running_container(&request.container_id)?;
    let work = async move { pod.reopen_log(&container.id).await.map_err(status_of) };
    server.run_detached(work).await?;
    Ok(ReopenContainerLogResponse {})
}
