//! The runtime as the NRI registry sees it: the state for new plugins, and unsolicited updates.

use super::messages::{container_message, pod_message};
use super::updates::apply_updates;
use super::{Inner, Server};
use crate::nri::Host;
use boxlite_proto::nri::v1alpha1::{Container, ContainerUpdate, PodSandbox};
use boxlite_runtime::ContainerState;
use std::sync::Weak;

/// Implements [`Host`] without keeping the server alive.
#[derive(Debug)]
pub(super) struct NriHost(pub(super) Weak<Inner>);

#[tonic::async_trait]
impl Host for NriHost {
    async fn snapshot(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        let Some(server) = self.0.upgrade().map(Server) else {
            return Default::default();
        };
        let starting = server.starting.lock().clone();
        let (mut pods, mut containers) = (Vec::new(), Vec::new());
        for pod in server.runtime.handles() {
            if starting.contains(pod.id()) || server.nri_registry().was_stopped(pod.id()) {
                continue;
            }
            pods.push(pod_message(&server, &pod));
            for container in pod.containers() {
                if matches!(
                    container.state,
                    ContainerState::Created | ContainerState::Running
                ) {
                    containers.push(container_message(&pod, &container).await);
                }
            }
        }
        (pods, containers)
    }

    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate> {
        match self.0.upgrade().map(Server) {
            Some(server) => apply_updates(&server, updates).await,
            None => updates,
        }
    }
}
