//! [`Target`]: the CRI runtime under test with its registry mirrors: boxlite-cri, or a containerd whose handler
//! `boxlite` is the shim.
//!
//! Starts and stops it and provides its socket paths. The parent module runs critest.

use super::{Suite, Transport};
use crate::containerd::{self, Containerd};
use crate::context::Backend;
use crate::ext4::Ext4;
use crate::failure::Result;
use crate::node::{Mirror, Node, NodeOptions};
use std::path::PathBuf;

/// Registry hosts of critest's image references.
const HOSTS: [&str; 3] = ["registry.k8s.io", "k8s.gcr.io", "gcr.io"];
/// Size in bytes of the disk for the state: a sparse file in memory.
const DISK_BYTES: u64 = 3 << 30;
/// NRI socket, relative to the runtime's directory.
const NRI_SOCKET: &str = "nri.sock";

/// CRI runtime under test.
pub(crate) enum Target {
    /// boxlite-cri.
    Boxlite {
        /// Node of the daemon.
        node: Box<Node>,
        /// Disk with the node's directory, unless it is on the scratch directory's tmpfs.
        _disk: Option<Ext4>,
    },
    /// A stock containerd and its version.
    Containerd(Box<Containerd>, String),
}

impl Target {
    /// Starts the runtime selected by the options.
    pub(crate) async fn start(suite: &Suite<'_>, transport: Transport) -> Result<Self> {
        let letter = &transport.name()[..1];
        let server = format!("http://{}", suite.registry.host);
        let mirror = |host: &str| -> Mirror { (host.to_owned(), server.clone(), None) };
        let registries = HOSTS.map(mirror).to_vec();
        let vmm = suite.options.backend.vmm();
        let Some(version) = suite.options.containerd else {
            let mut options = NodeOptions::new(&format!("c{letter}"), vmm);
            options.registries = registries;
            // critest's user namespace specs require a state file system with ID-mapped mounts, which tmpfs lacks on the
            // kernel of the emulated KVM host (6.1).
            let disk = match suite.options.backend {
                Backend::Qemu => None,
                Backend::Krun => {
                    let at = suite.scratch.join(&options.name);
                    Some(Ext4::mount(
                        &suite.scratch.join("state.img"),
                        DISK_BYTES,
                        &at,
                    )?)
                }
            };
            let node = Node::start(suite.scratch, suite.install, &options).await?;
            return Ok(Self::Boxlite {
                node: Box::new(node),
                _disk: disk,
            });
        };
        let mut options = containerd::Options::new(&format!("k{letter}"), version, vmm);
        options.registries = registries;
        let daemon = Containerd::start(suite.scratch, suite.install, options).await?;
        // Image of the pause container.
        let archive = containerd::archive(suite.install, suite.scratch)?;
        daemon.import(&archive).await?;
        let text = daemon.version_text().await?;
        Ok(Self::Containerd(Box::new(daemon), text))
    }

    /// Returns the name for titles and files.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Boxlite { .. } => "boxlite-cri".to_owned(),
            Self::Containerd(_, version) => format!("containerd-{version}"),
        }
    }

    /// Returns the runtime handler of the pods.
    pub(crate) fn handler(&self) -> Option<&'static str> {
        match self {
            Self::Boxlite { .. } => None,
            Self::Containerd(..) => Some("boxlite"),
        }
    }

    /// Returns the path of the CRI socket.
    pub(crate) fn socket(&self) -> PathBuf {
        match self {
            Self::Boxlite { node, .. } => node.socket(),
            Self::Containerd(daemon, _) => daemon.socket(),
        }
    }

    /// Returns the path of the NRI socket.
    pub(crate) fn nri(&self) -> PathBuf {
        match self {
            Self::Boxlite { node, .. } => node.dir.join(NRI_SOCKET),
            Self::Containerd(daemon, _) => daemon.dir.join(NRI_SOCKET),
        }
    }

    /// Returns the path of the daemon's log.
    pub(crate) fn log(&self) -> PathBuf {
        match self {
            Self::Boxlite { node, .. } => node.log(),
            Self::Containerd(daemon, _) => daemon.log(),
        }
    }

    /// Stops the daemon.
    pub(crate) async fn end(&self) -> Result {
        match self {
            Self::Boxlite { node, .. } => node.terminate().await,
            Self::Containerd(daemon, _) => daemon.kill().await,
        }
    }
}
