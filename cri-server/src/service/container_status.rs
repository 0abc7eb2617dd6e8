//! ContainerStatus, served from memory. With `verbose`, the spec is read and the guest is queried for the pid within
//! a deadline.

use super::{Server, require, status_of};
use crate::convert::{status, verbose};
use boxlite_proto::cri::v1::{ContainerStatusRequest, ContainerStatusResponse};
use boxlite_runtime::{ContainerSnapshot, ContainerState, LiteBox};
use std::collections::HashMap;
use tonic::Status;

/// Handles ContainerStatus.
pub(crate) async fn status(
    server: &Server,
    request: ContainerStatusRequest,
) -> Result<ContainerStatusResponse, Status> {
    require("container_id", &request.container_id)?;
    let (pod, container) = server
        .find_container(&request.container_id)
        .map_err(status_of)?;
    Ok(ContainerStatusResponse {
        status: Some(status::container_status(&container)),
        info: if request.verbose {
            info(server, &pod, &container).await
        } else {
            HashMap::new()
        },
    })
}

/// Returns the details that `crictl inspect` shows besides the status.
async fn info(
    server: &Server,
    pod: &LiteBox,
    container: &ContainerSnapshot,
) -> HashMap<String, String> {
    let spec = match pod.container_spec(&container.id).await {
        Ok(spec) => serde_json::to_value(spec).ok(),
        Err(error) => {
            tracing::debug!(
                id = container.id,
                error = boxlite_runtime::report(&error),
                "failed to read container spec"
            );
            None
        }
    };
    let pid = if container.state == ContainerState::Running {
        let limit = server.config.timeouts.stats;
        let asked = tokio::time::timeout(limit, pod.container_pid(&container.id)).await;
        asked.ok().and_then(Result::ok)
    } else {
        None
    };
    let info = verbose::container(container, spec, pid);
    HashMap::from([("info".to_owned(), info.to_string())])
}
