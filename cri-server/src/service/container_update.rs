//! UpdateContainerResources: new limits for the cgroup in the guest.

use super::{Server, present, refused};
use crate::convert::container::ContainerRecord;
use crate::convert::spec;
use boxlite_proto::cri::v1::{UpdateContainerResourcesRequest, UpdateContainerResourcesResponse};
use tonic::Status;

/// The call. A container that has ended has no limits to change: an error.
pub async fn update(
    server: &Server,
    request: UpdateContainerResourcesRequest,
) -> Result<UpdateContainerResourcesResponse, Status> {
    present("container_id", &request.container_id)?;
    let wish = request
        .linux
        .ok_or_else(|| Status::invalid_argument("linux is missing"))?;
    let (pod, container) = server
        .runtime
        .find_container(&request.container_id)
        .map_err(refused)?;
    let resources = spec::resources(Some(&wish))?.to_string().into_bytes();
    let task = server.clone();
    let work = async move {
        pod.update_container(&container.id, resources)
            .await
            .map_err(refused)?;
        let before = task
            .updates
            .get(&container.id)
            .or_else(|| ContainerRecord::decoded(&container.metadata).resources());
        task.updates.set(&container.id, before, wish);
        Ok(UpdateContainerResourcesResponse {})
    };
    server.detached(work).await
}
