//! UpdateContainerResources: applies new limits to the container's cgroup in the guest, with plugin changes and lowered
//! to the VM's capacity, and stores the applied ones with the container.

use super::error::ServiceError;
use super::{Server, capacity, nri_hooks, require, status_of};
use crate::convert::container::ContainerMetadata;
use crate::convert::{ConvertError, spec, stats};
use boxlite_proto::cri::v1::{
    LinuxContainerResources, UpdateContainerResourcesRequest, UpdateContainerResourcesResponse,
};
use boxlite_proto::nri::v1alpha1::Event;
use boxlite_runtime::{ContainerSnapshot, ContainerState, LiteBox};
use tonic::Status;

/// Handles UpdateContainerResources. Fails for a container that has exited.
pub(crate) async fn update(
    server: &Server,
    request: UpdateContainerResourcesRequest,
) -> Result<UpdateContainerResourcesResponse, Status> {
    require("container_id", &request.container_id)?;
    let requested = request.linux.ok_or(ConvertError::Missing("linux"))?;
    let (pod, container) = server
        .find_container(&request.container_id)
        .map_err(status_of)?;
    let now = ContainerMetadata::from_bytes(&container.metadata).resources();
    let requested = capacity::of_pod(server, &pod).cap(&container.id, requested, now.as_ref());
    spec::resources(Some(&requested))?;
    reject_limit_below_usage(server, &pod, &container, &requested).await?;
    let task = server.clone();
    let work = async move {
        let session = task.session().await;
        let in_guest = spec::without_host_cpusets(&requested);
        let in_guest = nri_hooks::update(&task, &session, &pod, &container, in_guest).await?;
        capacity::of_pod(&task, &pod).admit(&in_guest, now.as_ref())?;
        let resources = spec::resources(Some(&in_guest))?.to_string().into_bytes();
        // The status reports the host's cpusets, as the kubelet sent them.
        let mut stored = in_guest;
        for (stored, host) in [
            (&mut stored.cpuset_cpus, requested.cpuset_cpus),
            (&mut stored.cpuset_mems, requested.cpuset_mems),
        ] {
            if !host.is_empty() {
                *stored = host;
            }
        }
        let describe = Box::new(move |bytes: &[u8]| ContainerMetadata::updated(bytes, &stored));
        pod.update_container(&container.id, resources, describe)
            .await
            .map_err(status_of)?;
        let id = &container.id;
        nri_hooks::notify_container(&task, &session, Event::PostUpdateContainer, &pod, id).await;
        Ok(UpdateContainerResourcesResponse {})
    };
    server.run_detached(work).await
}

/// Rejects a memory limit below the memory that the container uses and the kernel cannot reclaim: it would be OOM-killed. If the
/// guest does not answer, the update proceeds.
async fn reject_limit_below_usage(
    server: &Server,
    pod: &LiteBox,
    container: &ContainerSnapshot,
    requested: &LinuxContainerResources,
) -> Result<(), ServiceError> {
    let Some(limit) = u64::try_from(requested.memory_limit_in_bytes)
        .ok()
        .filter(|limit| *limit > 0 && container.state == ContainerState::Running)
    else {
        return Ok(());
    };
    let answer = tokio::time::timeout(
        server.config.timeouts.stats,
        pod.container_stats(&container.id, false),
    );
    let Ok(Ok(answer)) = answer.await else {
        return Ok(());
    };
    let cgroup = answer.cgroup.unwrap_or_default();
    let usage = stats::unreclaimable(&cgroup);
    if limit >= usage {
        return Ok(());
    }
    Err(ServiceError::LimitBelowUsage {
        id: container.id.clone(),
        limit,
        usage,
    })
}
