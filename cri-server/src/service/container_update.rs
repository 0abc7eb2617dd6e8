//! UpdateContainerResources: new limits for the cgroup in the guest, as the plugins want them, within what the VM has, and
//! kept with the container.

use super::{Server, plugins, present, refused};
use crate::convert::container::ContainerRecord;
use crate::convert::size::{Room, VmSize};
use crate::convert::spec;
use boxlite_proto::cri::v1::{UpdateContainerResourcesRequest, UpdateContainerResourcesResponse};
use boxlite_proto::nri::v1alpha1::Event;
use boxlite_runtime::LiteBox;
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
    let now = ContainerRecord::decoded(&container.metadata).resources();
    room(server, &pod).admit(&wish, now.as_ref())?;
    spec::resources(Some(&wish))?;
    let task = server.clone();
    let work = async move {
        let session = task.session().await;
        let wish = plugins::update(&task, &session, &pod, &container, wish).await?;
        room(&task, &pod).admit(&wish, now.as_ref())?;
        let resources = spec::resources(Some(&wish))?.to_string().into_bytes();
        let describe = Box::new(move |bytes: &[u8]| ContainerRecord::updated(bytes, &wish));
        pod.update_container(&container.id, resources, describe)
            .await
            .map_err(refused)?;
        let id = &container.id;
        plugins::after(&task, &session, Event::PostUpdateContainer, &pod, id).await;
        Ok(UpdateContainerResourcesResponse {})
    };
    server.detached(work).await
}

/// What the pod's VM was made with.
pub fn room(server: &Server, pod: &LiteBox) -> Room {
    let record = server.pod_record(pod);
    let overhead = record
        .config
        .and_then(|config| config.linux)
        .and_then(|linux| linux.overhead);
    let options = pod.snapshot().options;
    let size = VmSize {
        vcpus: options.vcpus,
        memory_mib: options.memory_mib,
    };
    Room::of(size, overhead.as_ref(), &server.config.pod)
}
