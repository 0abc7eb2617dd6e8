//! ContainerStats, ListContainerStats and StreamContainerStats. Each guest has a deadline; a list omits guests that
//! miss it, so that they do not delay others.

use super::error::ServiceError;
use super::{Server, container_list, status_of};
use crate::convert::{filter, stats, time};
use boxlite_proto::cri::v1::{
    ContainerStats, ContainerStatsFilter, ContainerStatsRequest, ContainerStatsResponse,
};
use boxlite_runtime::{ContainerSnapshot, ContainerState, LiteBox};
use tonic::Status;

/// Handles ContainerStats. As in containerd, a container that does not run is an error, and so is a guest that does not answer.
pub(crate) async fn stats(
    server: &Server,
    request: ContainerStatsRequest,
) -> Result<ContainerStatsResponse, Status> {
    let (pod, container) = server.running_container(&request.container_id)?;
    let limit = server.config.timeouts.stats;
    let answer = tokio::time::timeout(limit, pod.container_stats(&container.id, false))
        .await
        .map_err(|_| ServiceError::StatsTimeout {
            subject: "container",
            id: container.id.clone(),
            limit,
        })?
        .map_err(status_of)?;
    let stats = stats::container(&container, Some(&answer), &scratch(server), time::now_ns());
    Ok(ContainerStatsResponse { stats: Some(stats) })
}

/// Returns the stats of all running containers that `wanted` selects.
pub(crate) async fn list(
    server: &Server,
    wanted: Option<ContainerStatsFilter>,
) -> Vec<ContainerStats> {
    let wanted = filter::of_container_stats(wanted);
    let containers = container_list::list(server, wanted.as_ref());
    let asked = containers
        .into_iter()
        .filter_map(|container| server.runtime.find_container(&container.id).ok())
        .map(|(pod, container)| one(server, pod, container));
    futures::future::join_all(asked)
        .await
        .into_iter()
        .flatten()
        .collect()
}

/// Returns the stats of the running containers of a pod whose guest answers.
pub(crate) async fn of_pod(server: &Server, pod: &LiteBox) -> Vec<ContainerStats> {
    let asked = pod
        .containers()
        .into_iter()
        .map(|container| one(server, pod.clone(), container));
    futures::future::join_all(asked)
        .await
        .into_iter()
        .flatten()
        .collect()
}

async fn one(
    server: &Server,
    pod: LiteBox,
    container: ContainerSnapshot,
) -> Option<ContainerStats> {
    if container.state != ContainerState::Running {
        return None;
    }
    let asked = tokio::time::timeout(
        server.config.timeouts.stats,
        pod.container_stats(&container.id, false),
    )
    .await;
    let answer = asked.ok()?.ok()?;
    Some(stats::container(
        &container,
        Some(&answer),
        &scratch(server),
        time::now_ns(),
    ))
}

/// Returns the host file system of the writable layers: the kubelet matches it with the container file systems of
/// ImageFsInfo.
fn scratch(server: &Server) -> String {
    let directory = server.runtime.layout().scratch_dir();
    directory.to_string_lossy().into_owned()
}
