//! UpdateContainerResources: applies new limits to the container's cgroup in the guest, with plugin changes and
//! within the VM's capacity, and stores them with the container.

use super::{Server, capacity, nri_hooks, require, status_of};
use crate::convert::container::ContainerMetadata;
use crate::convert::spec;
use boxlite_proto::cri::v1::{UpdateContainerResourcesRequest, UpdateContainerResourcesResponse};
use boxlite_proto::nri::v1alpha1::Event;
use tonic::Status;

/// Handles UpdateContainerResources. Fails for a container that has exited.
pub async fn update(
    server: &Server,
    request: UpdateContainerResourcesRequest,
) -> Result<UpdateContainerResourcesResponse, Status> {
    require("container_id", &request.container_id)?;
    let wish = request
        .linux
        .ok_or_else(|| Status::invalid_argument("linux is missing"))?;
    let (pod, container) = server
        .runtime
        .find_container(&request.container_id)
        .map_err(status_of)?;
    let now = ContainerMetadata::from_bytes(&container.metadata).resources();
    capacity::of_pod(server, &pod).admit(&wish, now.as_ref())?;
    spec::resources(Some(&wish))?;
    let task = server.clone();
    let work = async move {
        let session = task.session().await;
        let wish = nri_hooks::update(&task, &session, &pod, &container, wish).await?;
        capacity::of_pod(&task, &pod).admit(&wish, now.as_ref())?;
        let resources = spec::resources(Some(&wish))?.to_string().into_bytes();
        let describe = Box::new(move |bytes: &[u8]| ContainerMetadata::updated(bytes, &wish));
        pod.update_container(&container.id, resources, describe)
            .await
            .map_err(status_of)?;
        let id = &container.id;
        nri_hooks::notify_container(&task, &session, Event::PostUpdateContainer, &pod, id).await;
        Ok(UpdateContainerResourcesResponse {})
    };
    server.run_detached(work).await
}
