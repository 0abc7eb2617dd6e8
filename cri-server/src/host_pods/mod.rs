//! Host pods: pods that the node's own containerd runs, without a VM, because no VM can do their work (docs/host-pods.md).
//!
//! [`Router`] implements both CRI services in front of [`Server`]. RunPodSandbox goes to the side that `rules` selects, a call
//! for one id to the side that has it (`table`), and lists, Status, statistics, events and images are merged. It has no state
//! of VMs, and does nothing without an endpoint.
//!
//! ```text
//!  kubelet → server::layer → Router ─┬─▶ Server (VMs)
//!                                    └─▶ client → containerd's CRI socket
//! ```

mod client;
mod error;
mod events;
mod image_service;
mod image_stores;
mod lists;
mod lookup;
mod rules;
mod run;
mod runtime_service;
mod stats;
mod status;
mod table;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use error::HostPodsError;

use crate::config::HostPodsConfig;
use crate::service::Server;
use boxlite_proto::cri::v1::{Container, ListContainersRequest, ListPodSandboxRequest, PodSandbox};
use boxlite_sys::sync::Mutex;
use client::Client;
use rules::Rules;
use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use table::{HostPod, HostPodTable};

/// The CRI services of a node: VMs, and host pods if they are configured. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Router {
    server: Server,
    host: Option<Arc<HostPods>>,
}

/// containerd's side.
#[derive(Debug)]
struct HostPods {
    client: Client,
    rules: Rules,
    table: HostPodTable,
    /// Ids of images that a pod needs on the side that could not pull them without credentials. They are reported as missing,
    /// so that the kubelet pulls again, with credentials.
    missing_images: Mutex<HashSet<String>>,
    /// Limits of the calls that go on without their clients.
    limits: Limits,
}

/// Limits of the calls to containerd that continue if the client disconnects.
#[derive(Debug)]
struct Limits {
    /// RunPodSandbox and CreateContainer.
    run: Duration,
    /// PullImage for the other store.
    pull: Duration,
}

impl Router {
    /// Creates the services. `table` is the path of the table of host pods.
    pub(crate) fn new(server: Server, config: &HostPodsConfig, table: PathBuf) -> Self {
        let host = config.endpoint.as_ref().map(|endpoint| {
            Arc::new(HostPods {
                client: Client::new(endpoint),
                rules: Rules::new(config),
                table: HostPodTable::load(table),
                missing_images: Mutex::default(),
                limits: Limits {
                    run: server.config.timeouts.run_pod,
                    pull: server.config.registry.pull_timeout,
                },
            })
        });
        Self { server, host }
    }

    /// Updates the table from containerd's lists and logs each pod without a VM. Called at the start, before the first
    /// request.
    pub(crate) async fn start(&self) {
        let Some(host) = &self.host else { return };
        let known = host.table.pod_ids();
        host.pods().await;
        host.containers().await;
        // The others were logged when the list showed them.
        for pod in host.table.pods() {
            if known.contains(pod.id()) {
                host.log_pod(&pod);
            }
        }
    }
}

impl HostPods {
    /// Returns containerd's pods, or those of the table while containerd is down.
    async fn pods(&self) -> Vec<PodSandbox> {
        let before = self.table.pod_ids();
        let mut runtime = self.client.runtime();
        let list = self
            .client
            .merged(runtime.list_pod_sandbox(ListPodSandboxRequest::default()));
        match list.await {
            Ok(list) => {
                for pod in self.table.listed_pods(&before, &list.items) {
                    self.log_pod(&pod);
                }
                list.items
            }
            Err(_) => self.table.unknown_pods(),
        }
    }

    /// Returns containerd's containers, or those of the table while containerd is down.
    async fn containers(&self) -> Vec<Container> {
        let before = self.table.container_ids();
        let mut runtime = self.client.runtime();
        let list = self
            .client
            .merged(runtime.list_containers(ListContainersRequest::default()));
        match list.await {
            Ok(list) => {
                self.table.listed_containers(&before, &list.containers);
                list.containers
            }
            Err(_) => self.table.unknown_containers(),
        }
    }

    fn log_pod(&self, host_pod: &HostPod) {
        let pod = host_pod.pod.clone().unwrap_or_default();
        let metadata = pod.metadata.unwrap_or_default();
        tracing::info!(
            id = pod.id,
            pod = metadata.name,
            namespace = metadata.namespace,
            rule = host_pod.rule,
            endpoint = %self.client.endpoint().display(),
            "pod runs without a VM"
        );
    }
}
