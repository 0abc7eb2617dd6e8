//! Applies the container updates that plugins request.

use super::messages::vcpus;
use super::{Server, status_of};
use crate::convert::container::ContainerMetadata;
use crate::nri::resources;
use crate::service::capacity;
use crate::service::error::ServiceError;
use boxlite_proto::nri::v1alpha1::{ContainerUpdate, LinuxResources};
use tonic::Status;

/// Applies `updates`; fails if an update without `ignore_failure` fails.
pub(super) async fn apply_required(
    server: &Server,
    updates: Vec<ContainerUpdate>,
) -> Result<(), Status> {
    let failed = apply_updates(server, updates).await;
    match failed.first() {
        None => Ok(()),
        Some(update) => Err(ServiceError::Adjustment {
            id: update.container_id.clone(),
            reason: "a required update failed, see the daemon's log".into(),
        }
        .into()),
    }
}

/// Applies each update independently and returns those that failed without `ignore_failure`.
pub(super) async fn apply_updates(
    server: &Server,
    updates: Vec<ContainerUpdate>,
) -> Vec<ContainerUpdate> {
    let mut failed = Vec::new();
    for update in updates {
        let wanted = update
            .linux
            .as_ref()
            .and_then(|linux| linux.resources.clone())
            .unwrap_or_default();
        if let Err(status) = apply_update(server, &update.container_id, &wanted).await {
            tracing::warn!(
                id = update.container_id,
                reason = status.message(),
                "failed to apply container update of NRI plugin"
            );
            if !update.ignore_failure {
                failed.push(update);
            }
        }
    }
    failed
}

async fn apply_update(server: &Server, id: &str, wanted: &LinuxResources) -> Result<(), Status> {
    let (pod, container) = server.runtime.find_container(id).map_err(status_of)?;
    resources::check(wanted, vcpus(&pod)).map_err(|error| ServiceError::Adjustment {
        id: id.to_owned(),
        reason: error.to_string(),
    })?;
    let requested = resources::cri(wanted);
    let now = ContainerMetadata::from_bytes(&container.metadata).resources();
    capacity::of_pod(server, &pod).admit(&requested, now.as_ref())?;
    let json = resources::oci(wanted).to_string().into_bytes();
    let describe = Box::new(move |bytes: &[u8]| ContainerMetadata::updated(bytes, &requested));
    pod.update_container(&container.id, json, describe)
        .await
        .map_err(status_of)
}
