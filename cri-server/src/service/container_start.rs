//! StartContainer: starts the container unless a plugin rejects it.

use super::error::ServiceError;
use super::{Server, nri_hooks, require, status_of};
use boxlite_proto::cri::v1::{StartContainerRequest, StartContainerResponse};
use boxlite_proto::nri::v1alpha1::Event;
use boxlite_runtime::{ContainerState, LiteBox};
use tonic::Status;

/// Handles StartContainer. Fails for a container that is already running or has exited; the retry of a call whose client gave up
/// joins it or gets its result.
pub(crate) async fn start(
    server: &Server,
    request: StartContainerRequest,
) -> Result<StartContainerResponse, Status> {
    require("container_id", &request.container_id)?;
    let (pod, container) = server
        .find_container(&request.container_id)
        .map_err(status_of)?;
    let id = container.id;
    let work = || {
        let (server, id) = (server.clone(), id.clone());
        async move { start_created(&server, &pod, &id).await.map(|()| id) }
    };
    server
        .starts
        .join(&server.tasks, id.clone(), id.clone(), work)
        .await?;
    Ok(StartContainerResponse {})
}

async fn start_created(server: &Server, pod: &LiteBox, id: &str) -> Result<(), Status> {
    let container = pod.container(id).map_err(status_of)?;
    if container.state == ContainerState::Running {
        let id = id.to_owned();
        return Err(ServiceError::ContainerStarted { id }.into());
    }
    if container.state != ContainerState::Created {
        return Err(ServiceError::ContainerState {
            id: id.to_owned(),
            state: container.state,
            required: ContainerState::Created,
        }
        .into());
    }
    let session = server.session().await;
    nri_hooks::start(server, &session, pod, &container).await?;
    let started = pod.start_container(id).await;
    // A failed start ends the container, too.
    nri_hooks::watch(server, pod, id);
    started.map_err(status_of)?;
    nri_hooks::notify_container(server, &session, Event::PostStartContainer, pod, id).await;
    Ok(())
}
