//! StartContainer: starts the container unless a plugin rejects it.

use super::{Server, nri_hooks, require, status_of};
use boxlite_proto::cri::v1::{StartContainerRequest, StartContainerResponse};
use boxlite_proto::nri::v1alpha1::Event;
use tonic::Status;

/// Handles StartContainer.
pub async fn start(
    server: &Server,
    request: StartContainerRequest,
) -> Result<StartContainerResponse, Status> {
    require("container_id", &request.container_id)?;
    let (pod, container) = server
        .runtime
        .find_container(&request.container_id)
        .map_err(status_of)?;
    let task = server.clone();
    let work = async move {
        let session = task.session().await;
        nri_hooks::start(&task, &session, &pod, &container).await?;
        let started = pod.start_container(&container.id).await;
        // A failed start ends the container, too.
        nri_hooks::watch(&task, &pod, &container.id);
        started.map_err(status_of)?;
        let id = &container.id;
        nri_hooks::notify_container(&task, &session, Event::PostStartContainer, &pod, id).await;
        Ok(())
    };
    server.run_detached(work).await?;
    Ok(StartContainerResponse {})
}
