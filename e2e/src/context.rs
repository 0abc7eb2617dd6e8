//! [`TestContext`]: shared state of the test cases: backend, scratch directory, registry and images, and a node for all cases
//! that do not break or configure one.

use crate::client::answer;
use crate::failure::{During, Result};
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::install::Install;
use crate::node::{Node, NodeOptions};
use crate::pod::{Pod, SHARED_POD};
use k8s_cri::v1::{ListPodSandboxRequest, PodSandboxFilter};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Environment in which a suite runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Backend {
    /// QEMU on this machine.
    Qemu,
    /// libkrun on a machine with KVM: the emulated KVM host.
    Krun,
}

impl Backend {
    /// Returns the value of the daemon's `vmm` key.
    pub(crate) fn vmm(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Krun => "krun",
        }
    }

    /// Scales a time limit for the backend: nested emulation is several times slower.
    pub(crate) fn patience(self, seconds: u64) -> Duration {
        Duration::from_secs(match self {
            Self::Qemu => seconds,
            Self::Krun => seconds * 5,
        })
    }
}

/// Shared state of the test cases.
pub(crate) struct TestContext {
    /// Backend of the run.
    pub backend: Backend,
    /// Scratch directory, a tmpfs.
    pub scratch: PathBuf,
    /// Programs under test.
    pub install: Install,
    /// Registry on loopback, plain HTTP.
    pub registry: Registry,
    /// Images in the registry.
    pub images: ImageSet,
    /// Shared node, with the images pulled.
    pub node: Arc<Node>,
    shared_pod: Mutex<Pod>,
}

impl TestContext {
    /// Starts the registry and the shared node, pushes and pulls the images.
    pub(crate) async fn build(backend: Backend) -> Result<Self> {
        let scratch = crate::namespaces::scratch();
        let install = Install::find()?;
        let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
        let images = ImageSet::push(&registry, &install.busybox)
            .await
            .during("failed to push the images")?;
        let node = Node::start(&scratch, &install, &node_options("n", backend, &registry)).await?;
        crate::pod::pull(&node, &images.base).await?;
        let node = Arc::new(node);
        let shared_pod = Mutex::new(Pod::run(&node, SHARED_POD).await?);
        Ok(Self {
            backend,
            scratch,
            install,
            registry,
            images,
            node,
            shared_pod,
        })
    }

    /// Returns the pod that is shared by the cases without requirements on the sandbox, since booting takes most of a short
    /// case's time. It has no containers; [`Pod::end`] removes those of the case.
    pub(crate) async fn shared_pod(&self) -> Pod {
        self.shared_pod.lock().await.clone()
    }

    /// Returns the ids of the shared node's pods that match the filter, except the shared pod's.
    pub(crate) async fn pods(&self, filter: PodSandboxFilter) -> Result<Vec<String>> {
        let filter = Some(filter);
        let request = ListPodSandboxRequest { filter };
        let list = self.node.cri.runtime().list_pod_sandbox(request).await;
        let shared = self.shared_pod().await.id;
        let ids = answer("ListPodSandbox", list)?
            .items
            .into_iter()
            .map(|p| p.id);
        Ok(ids.filter(|id| *id != shared).collect())
    }

    /// Replaces the shared pod after a failed case.
    pub(crate) async fn replace_shared_pod(&self) -> Result {
        let mut shared = self.shared_pod.lock().await;
        shared.stop().await?;
        shared.remove().await?;
        *shared = Pod::run(&self.node, SHARED_POD).await?;
        Ok(())
    }

    /// Starts another node, for a case that kills, breaks or configures the daemon.
    pub(crate) async fn dedicated_node(
        &self,
        name: &str,
        change: impl FnOnce(&mut NodeOptions),
    ) -> Result<Arc<Node>> {
        self.node_of(&self.install, name, change).await
    }

    /// Writes the configuration of another node, whose daemon the case starts.
    pub(crate) fn unstarted_node(&self, name: &str) -> Result<Arc<Node>> {
        let options = node_options(name, self.backend, &self.registry);
        let node = Node::prepare(&self.scratch, &self.install, &options)?;
        Ok(Arc::new(node))
    }

    /// As [`Self::dedicated_node`], with another installation.
    pub(crate) async fn node_of(
        &self,
        install: &Install,
        name: &str,
        change: impl FnOnce(&mut NodeOptions),
    ) -> Result<Arc<Node>> {
        let mut options = node_options(name, self.backend, &self.registry);
        change(&mut options);
        Ok(Arc::new(
            Node::start(&self.scratch, install, &options).await?,
        ))
    }

    /// Scales a time limit; see [`Backend::patience`].
    pub(crate) fn patience(&self, seconds: u64) -> Duration {
        self.backend.patience(seconds)
    }

    /// Returns the number of rounds of a long case: `all`, or `fewer` in the emulated KVM host unless `BOXLITE_E2E_WHOLE` is
    /// set.
    pub(crate) fn rounds(&self, all: usize, fewer: usize) -> usize {
        match self.backend {
            Backend::Krun if std::env::var_os("BOXLITE_E2E_WHOLE").is_none() => fewer,
            _ => all,
        }
    }
}

/// Returns the number of daemon kills that `make kills` asks for; see docs/development.md.
pub(crate) fn kills() -> Option<usize> {
    std::env::var("BOXLITE_E2E_KILLS").ok()?.parse().ok()
}

/// Returns the options of a node of this backend. Under emulation iptables takes longer than the pod itself and does the
/// same for every VMM, so only the host port case enables it there.
fn node_options(name: &str, backend: Backend, registry: &Registry) -> NodeOptions {
    let mut options = options(name, backend.vmm(), registry);
    options.iptables = backend == Backend::Qemu;
    options
}

/// Returns the options of a node that accepts the plain-HTTP registry.
pub(crate) fn options(name: &str, vmm: &str, registry: &Registry) -> NodeOptions {
    let mut options = NodeOptions::new(name, vmm);
    options.registries.push((
        registry.host.clone(),
        format!("http://{}", registry.host),
        None,
    ));
    options
}
