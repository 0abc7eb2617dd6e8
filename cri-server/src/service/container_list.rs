//! ListContainers and StreamContainers, served from memory without the VM.

use super::Server;
use crate::convert::{filter, status};
use boxlite_proto::cri::v1::{Container, ContainerFilter};

/// Returns the containers that `wanted` selects, newest first.
pub(crate) fn list(server: &Server, wanted: Option<&ContainerFilter>) -> Vec<Container> {
    let mut containers: Vec<Container> = server
        .runtime
        .containers()
        .iter()
        .map(status::container)
        .filter(|container| filter::container(wanted, container))
        .collect();
    containers.sort_by_key(|container| std::cmp::Reverse(container.created_at));
    containers
}
