//! ListPodSandbox and StreamPodSandboxes, served from memory without the VM.

use super::Server;
use crate::convert::{filter, status};
use boxlite_proto::cri::v1::{PodSandbox, PodSandboxFilter};

/// Returns the pods that `wanted` selects, newest first.
pub(crate) fn list(server: &Server, wanted: Option<&PodSandboxFilter>) -> Vec<PodSandbox> {
    let starting = server.starting.lock().clone();
    let mut pods: Vec<PodSandbox> = server
        .runtime
        .boxes()
        .iter()
        .filter(|pod| !starting.contains(&pod.id))
        .map(status::sandbox)
        .filter(|pod| filter::sandbox(wanted, pod))
        .collect();
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    pods
}
