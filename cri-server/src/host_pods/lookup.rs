//! Decides which side has an id: the runtime's database and the table of host pods are complete, so none is guessed.

use super::error::HostPodsError;
use super::{HostPods, Router};
use boxlite_runtime::{ErrorKind, RuntimeError};
use std::sync::Arc;
use tonic::Status;

/// The side that handles a call.
#[derive(Clone)]
pub(super) enum Side {
    /// This runtime, also for ids that do not exist.
    Vm,
    /// containerd, with the complete id.
    Host(Arc<HostPods>, String),
}

impl Router {
    /// Returns the side of a pod's id or unique prefix.
    pub(super) fn pod_side(&self, id: &str) -> Result<Side, Status> {
        let Some(host) = &self.host else {
            return Ok(Side::Vm);
        };
        let theirs = host.table.matching_pods(id);
        let ours = self.server.runtime.get_box(id);
        let ours = ours.map(|pod| pod.id().to_owned());
        select(host, "pod sandbox", id, theirs, ours)
    }

    /// Returns the side of a container's id or unique prefix.
    pub(super) fn container_side(&self, id: &str) -> Result<Side, Status> {
        let Some(host) = &self.host else {
            return Ok(Side::Vm);
        };
        let theirs = host.table.matching_containers(id);
        let ours = self.server.runtime.find_container(id);
        let ours = ours.map(|(_, container)| container.id);
        select(host, "container", id, theirs, ours)
    }
}

fn select(
    host: &Arc<HostPods>,
    subject: &'static str,
    id: &str,
    theirs: Vec<String>,
    ours: Result<String, RuntimeError>,
) -> Result<Side, Status> {
    let is_absent = matches!(&ours, Err(error) if error.kind() == ErrorKind::NotFound);
    match (&theirs[..], &ours) {
        ([], _) => Ok(Side::Vm),
        (_, Ok(exact)) if exact == id => Ok(Side::Vm),
        ([exact], _) if exact == id => Ok(Side::Host(host.clone(), exact.clone())),
        ([one], _) if is_absent => Ok(Side::Host(host.clone(), one.clone())),
        (several, _) => Err(HostPodsError::AmbiguousId {
            subject,
            prefix: id.to_owned(),
            count: several.len() + usize::from(!is_absent),
        }
        .into()),
    }
}
