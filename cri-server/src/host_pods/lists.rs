//! Lists of pods and containers of both sides, newest first. While containerd is down its pods are NOTREADY and its containers
//! UNKNOWN, from the table.

use super::Router;
use crate::convert::filter;
use crate::service::{container_list, sandbox_list};
use boxlite_proto::cri::v1::{Container, ContainerFilter, PodSandbox, PodSandboxFilter};
use std::cmp::Reverse;

impl Router {
    /// Returns the pods of both sides that `wanted` selects.
    pub(super) async fn pods(&self, wanted: Option<PodSandboxFilter>) -> Vec<PodSandbox> {
        let mut pods = sandbox_list::list(&self.server, wanted.as_ref());
        if let Some(host) = &self.host {
            let theirs = host.pods().await.into_iter();
            pods.extend(theirs.filter(|pod| filter::sandbox(wanted.as_ref(), pod)));
            pods.sort_by_key(|pod| Reverse(pod.created_at));
        }
        pods
    }

    /// Returns the containers of both sides that `wanted` selects.
    pub(super) async fn containers(&self, wanted: Option<ContainerFilter>) -> Vec<Container> {
        let mut containers = container_list::list(&self.server, wanted.as_ref());
        if let Some(host) = &self.host {
            let theirs = host.containers().await.into_iter();
            containers.extend(theirs.filter(|c| filter::container(wanted.as_ref(), c)));
            containers.sort_by_key(|container| Reverse(container.created_at));
        }
        containers
    }
}
