//! [`Target`]: the CRI runtime that critest judges, with its registry mirrors: boxlite-cri, or a containerd whose handler
//! `boxlite` is the shim.
//!
//! Starts and ends it and knows its sockets. How critest is called is the parent module's.

use super::{Suite, Transport};
use crate::containerd::{self, Containerd};
use crate::node::{Mirror, Node, NodeOptions};
use crate::outcome::Result;
use std::path::PathBuf;

/// Hosts that critest's references name.
const HOSTS: [&str; 3] = ["registry.k8s.io", "k8s.gcr.io", "gcr.io"];
/// Below the directory of either, as its configuration says.
const NRI_SOCKET: &str = "nri.sock";

/// See the module.
pub enum Target {
    /// The daemon of this project.
    Boxlite(Box<Node>),
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
            let node = Node::start(suite.scratch, suite.install, &options).await?;
            return Ok(Self::Boxlite(Box::new(node)));
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
            Self::Boxlite(_) => "boxlite-cri".to_owned(),
            Self::Containerd(_, version) => format!("containerd-{version}"),
        }
    }

    /// The runtime handler that pods ask for.
    pub fn handler(&self) -> Option<&'static str> {
        match self {
            Self::Boxlite(_) => None,
            Self::Containerd(..) => Some("boxlite"),
        }
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        match self {
            Self::Boxlite(node) => node.socket(),
            Self::Containerd(daemon, _) => daemon.socket(),
        }
    }

    /// Where NRI plugins come.
    pub fn nri(&self) -> PathBuf {
        match self {
            Self::Boxlite(node) => node.dir.join(NRI_SOCKET),
            Self::Containerd(daemon, _) => daemon.dir.join(NRI_SOCKET),
        }
    }

    /// The daemon's log.
    pub fn log(&self) -> PathBuf {
        match self {
            Self::Boxlite(node) => node.log(),
            Self::Containerd(daemon, _) => daemon.log(),
        }
    }

    /// Ends the daemon.
    pub async fn end(&self) -> Result {
        match self {
            Self::Boxlite(node) => node.terminate().await,
            Self::Containerd(daemon, _) => daemon.kill().await,
        }
    }
}
