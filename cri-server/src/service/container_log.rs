//! ReopenContainerLog: reopens the log after the kubelet renamed it.

use super::{Server, status_of};
use boxlite_proto::cri::v1::{ReopenContainerLogRequest, ReopenContainerLogResponse};
use tonic::Status;

/// Handles ReopenContainerLog. Only a running container has an open log.
pub(crate) async fn reopen(
    server: &Server,
    request: ReopenContainerLogRequest,
) -> Result<ReopenContainerLogResponse, Status> {
    let (pod, container) = server.running_container(&request.container_id)?;
    let work = async move { pod.reopen_log(&container.id).await.map_err(status_of) };
    server.run_detached(work).await?;
    Ok(ReopenContainerLogResponse {})
}
