//! [`World`]: what every test gets: the home, the scratch directory, the registry with its images, a node shared by the
//! tests that leave it well, and a factor for patience.

use crate::client::answer;
use crate::image::registry::Registry;
use crate::image::set::ImageSet;
use crate::install::Install;
use crate::node::{Node, NodeOptions};
use crate::outcome::{During, Result};
use crate::pod::{COMMON, Pod};
use k8s_cri::v1::{ListPodSandboxRequest, PodSandboxFilter};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Where the suite runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Home {
    /// VmmKind::Qemu on this machine.
    Qemu,
    /// VmmKind::Krun, where KVM works: the emulated KVM host.
    Krun,
}

impl Home {
    /// The daemon's `vmm`.
    pub fn vmm(self) -> &'static str {
        match self {
            Self::Qemu => "qemu",
            Self::Krun => "krun",
        }
    }

    /// A time limit that is fair in this home: nested emulation is several times slower.
    pub fn patience(self, seconds: u64) -> Duration {
        Duration::from_secs(match self {
            Self::Qemu => seconds,
            Self::Krun => seconds * 5,
        })
    }
}

/// What tests share.
pub struct World {
    /// Which VMM.
    pub home: Home,
    /// A tmpfs.
    pub scratch: PathBuf,
    /// Programs.
    pub install: Install,
    /// Plain HTTP on loopback.
    pub registry: Registry,
    /// What it serves.
    pub images: ImageSet,
    /// The shared node; the images are pulled.
    pub node: Arc<Node>,
    common: Mutex<Pod>,
}

impl World {
    /// Starts registry and shared node, pushes and pulls the images.
    pub async fn build(home: Home) -> Result<Self> {
        let scratch = crate::enclave::scratch();
        let install = Install::find()?;
        let registry = Registry::start(&install.registry, &scratch, 5000, false).await?;
        let images = ImageSet::push(&registry, &install.busybox)
            .await
            .during("pushing the images")?;
        let node = Node::start(&scratch, &install, &node_options("n", home, &registry)).await?;
        crate::pod::pull(&node, &images.base).await?;
        let node = Arc::new(node);
        let common = Mutex::new(Pod::run(&node, COMMON).await?);
        Ok(Self {
            home,
            scratch,
            install,
            registry,
            images,
            node,
            common,
        })
    }

    /// The pod that the cases share which ask nothing of a pod: a boot is most of what a short one takes. It has no
    /// containers; [`Pod::end`] takes the case's away.
    pub async fn pod(&self) -> Pod {
        self.common.lock().await.clone()
    }

    /// Ids of the shared node's pods that pass the filter, without the common one.
    pub async fn pods(&self, filter: PodSandboxFilter) -> Result<Vec<String>> {
        let filter = Some(filter);
        let request = ListPodSandboxRequest { filter };
        let list = self.node.cri.runtime().list_pod_sandbox(request).await;
        let common = self.pod().await.id;
        let ids = answer("ListPodSandbox", list)?
            .items
            .into_iter()
            .map(|p| p.id);
        Ok(ids.filter(|id| *id != common).collect())
    }

    /// Another pod to share: behind a case that failed.
    pub async fn renew(&self) -> Result {
        let mut common = self.common.lock().await;
        common.stop().await?;
        common.remove().await?;
        *common = Pod::run(&self.node, COMMON).await?;
        Ok(())
    }

    /// A further node of its own for a test that kills, breaks or configures.
    pub async fn own_node(
        &self,
        name: &str,
        change: impl FnOnce(&mut NodeOptions),
    ) -> Result<Arc<Node>> {
        let mut options = node_options(name, self.home, &self.registry);
        change(&mut options);
        Ok(Arc::new(
            Node::start(&self.scratch, &self.install, &options).await?,
        ))
    }

    /// See [`Home::patience`].
    pub fn patience(&self, seconds: u64) -> Duration {
        self.home.patience(seconds)
    }

    /// How often a case repeats itself, or how much it moves: `all`, and in the emulated KVM host `fewer`, unless
    /// `BOXLITE_E2E_WHOLE` is set.
    pub fn rounds(&self, all: usize, fewer: usize) -> usize {
        match self.home {
            Home::Krun if std::env::var_os("BOXLITE_E2E_WHOLE").is_none() => fewer,
            _ => all,
        }
    }
}

/// A node of this home's tests. Emulated, iptables takes longer than the pod itself, and what it does is the host's affair
/// and the same for every VMM: there only the case about host ports has it.
fn node_options(name: &str, home: Home, registry: &Registry) -> NodeOptions {
    let mut options = options(name, home.vmm(), registry);
    options.iptables = home == Home::Qemu;
    options
}

/// A node that knows the plain-HTTP registry.
pub fn options(name: &str, vmm: &str, registry: &Registry) -> NodeOptions {
    let mut options = NodeOptions::new(name, vmm);
    options.registries.push((
        registry.host.clone(),
        format!("http://{}", registry.host),
        None,
    ));
    options
}
