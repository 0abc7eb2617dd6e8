//! StartContainer: unless a plugin refuses it.

use super::{Server, plugins, present, refused};
use boxlite_proto::cri::v1::{StartContainerRequest, StartContainerResponse};
use boxlite_proto::nri::v1alpha1::Event;
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
    let task = server.clone();
    let work = async move {
        let session = task.session().await;
        plugins::start(&task, &session, &pod, &container).await?;
        let started = pod.start_container(&container.id).await;
        // A failed start has ended the container too.
        plugins::watch(&task, &pod, &container.id);
        started.map_err(refused)?;
        let id = &container.id;
        plugins::after(&task, &session, Event::PostStartContainer, &pod, id).await;
        Ok(())
    };
    server.detached(work).await?;
    Ok(StartContainerResponse {})
}
