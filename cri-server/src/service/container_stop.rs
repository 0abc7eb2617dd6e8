//! StopContainer: the container's stop signal, the grace period, then SIGKILL. Succeeds if the container is stopped
//! or does not exist.

use super::{Server, none_if_not_found, nri_hooks, require, status_of};
use crate::convert::container::ContainerMetadata;
use crate::convert::{ConvertError, signal};
use boxlite_proto::cri::v1::{StopContainerRequest, StopContainerResponse};
use std::time::Duration;
use tonic::Status;

/// Handles StopContainer.
pub(crate) async fn stop(
    server: &Server,
    request: StopContainerRequest,
) -> Result<StopContainerResponse, Status> {
    require("container_id", &request.container_id)?;
    let Some((pod, container)) = none_if_not_found(server.find_container(&request.container_id))?
    else {
        return Ok(StopContainerResponse {});
    };
    let record = ContainerMetadata::from_bytes(&container.metadata);
    let number = if record.stop_signal == 0 {
        signal::TERM
    } else {
        record.stop_signal
    };
    let number = i32::try_from(number).map_err(|_| {
        ConvertError::invalid("stop_signal", number.to_string(), "not a signal number")
    })?;
    // A negative timeout has no meaning; 0 means "immediately" in the CRI.
    let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
    let task = server.clone();
    let work = async move {
        pod.stop_container(&container.id, grace, number)
            .await
            .map_err(status_of)?;
        nri_hooks::container_ended(&task, &pod, &container.id).await;
        Ok(())
    };
    server.run_detached(work).await?;
    Ok(StopContainerResponse {})
}
