//! [`Target`]: the CRI runtime that critest judges, with its registry mirrors: boxlite-cri, or a containerd whose handler
//! `boxlite` is the shim.
//!
//! Starts and ends it and knows its sockets. How critest is called is the parent module's.

use super::{Suite, Transport};
use crate::containerd::{self, Containerd};
use crate::ext4::Ext4;
use crate::node::{Mirror, Node, NodeOptions};
use crate::outcome::Result;
use crate::world::Home;
use std::path::PathBuf;

/// Hosts that critest's references name.
const HOSTS: [&str; 3] = ["registry.k8s.io", "k8s.gcr.io", "gcr.io"];
/// Bytes of a disk for the state: sparse, in memory.
const DISK: u64 = 3 << 30;
/// Below the directory of either, as its configuration says.
const NRI_SOCKET: &str = "nri.sock";

/// See the module.
pub enum Target {
    /// The daemon of this project.
    Boxlite {
        /// Its node.
        node: Box<Node>,
        /// Where the node's directory is, where it is not on the scratch directory's tmpfs.
        _disk: Option<Ext4>,
    },
    /// A stock containerd, and its version.
    Containerd(Box<Containerd>, String),
}

impl Target {
    /// Starts what the options of the run ask for.
    pub async fn start(suite: &Suite<'_>, transport: Transport) -> Result<Self> {
        let letter = &transport.name()[..1];
        let server = format!("http://{}", suite.registry.host);
        let mirror = |host: &str| -> Mirror { (host.to_owned(), server.clone(), None) };
        let registries = HOSTS.map(mirror).to_vec();
        let vmm = suite.options.home.vmm();
        let Some(version) = suite.options.containerd else {
            let mut options = NodeOptions::new(&format!("c{letter}"), vmm);
            options.registries = registries;
            // critest's specs of user namespaces ask whether the state's file system can map ids: tmpfs cannot on the
            // emulated KVM host's kernel (6.1).
            let disk = match suite.options.home {
                Home::Qemu => None,
                Home::Krun => {
                    let at = suite.scratch.join(&options.name);
                    Some(Ext4::mount(&suite.scratch.join("state.img"), DISK, &at)?)
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
        // The pause container's.
        let archive = containerd::archive(suite.install, suite.scratch)?;
        daemon.import(&archive).await?;
        let text = daemon.version_text().await?;
        Ok(Self::Containerd(Box::new(daemon), text))
    }

    /// For titles and files.
    pub fn name(&self) -> String {
        match self {
            Self::Boxlite { .. } => "boxlite-cri".to_owned(),
            Self::Containerd(_, version) => format!("containerd-{version}"),
        }
    }

    /// The runtime handler that pods ask for.
    pub fn handler(&self) -> Option<&'static str> {
        match self {
            Self::Boxlite { .. } => None,
            Self::Containerd(..) => Some("boxlite"),
        }
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        match self {
            Self::Boxlite { node, .. } => node.socket(),
            Self::Containerd(daemon, _) => daemon.socket(),
        }
    }

    /// Where NRI plugins come.
    pub fn nri(&self) -> PathBuf {
        match self {
            Self::Boxlite { node, .. } => node.dir.join(NRI_SOCKET),
            Self::Containerd(daemon, _) => daemon.dir.join(NRI_SOCKET),
        }
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        match self {
            Self::Boxlite { node, .. } => node.log(),
            Self::Containerd(daemon, _) => daemon.log(),
        }
    }

    /// Ends the daemon.
    pub async fn end(&self) -> Result {
        match self {
            Self::Boxlite { node, .. } => node.terminate().await,
            Self::Containerd(daemon, _) => daemon.kill().await,
        }
    }
}
