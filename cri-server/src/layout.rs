//! Paths of cri-server's files below the daemon's two directories; all others are in the runtime's FilesystemLayout.
//!
//! ```text
//! root/cache/                    files that VMs derive from the installation
//! root/cni/<sandbox id>.json     undo record of a pod's network
//! root/host-pods.pb              pods that the node's containerd runs
//! state/netns/<sandbox id>       the pod's network namespace (a bind mount)
//! state/pods/<sandbox id>/       resolv.conf, hostname, hosts
//! ```

use boxlite_config::paths::DEFAULT_STATE_DIR;
use std::path::{Path, PathBuf};

/// Names of a pod's files.
pub(crate) const HOSTNAME: &str = "hostname";
pub(crate) const HOSTS: &str = "hosts";
pub(crate) const RESOLV_CONF: &str = "resolv.conf";

/// Returns the CRI socket unless another one is configured.
pub(crate) fn default_socket() -> PathBuf {
    Path::new(DEFAULT_STATE_DIR).join("cri.sock")
}

/// Paths of cri-server's files.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
    state: PathBuf,
}

impl Layout {
    /// Creates the layout; `root` is persistent, `state` lasts until the next boot.
    pub(crate) fn new(root: &Path, state: &Path) -> Self {
        Self {
            root: root.to_owned(),
            state: state.to_owned(),
        }
    }

    /// Returns the directory of files that VMs derive from the installation, such as the kernel in another format.
    pub(crate) fn cache(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Returns the directory of the CNI records.
    pub(crate) fn cni_records(&self) -> PathBuf {
        self.root.join("cni")
    }

    /// Returns the table of host pods.
    pub(crate) fn host_pods(&self) -> PathBuf {
        self.root.join("host-pods.pb")
    }

    /// Returns the directory of the network namespaces.
    pub(crate) fn namespaces(&self) -> PathBuf {
        self.state.join("netns")
    }

    /// Returns the directory of all pods' files.
    pub(crate) fn pods(&self) -> PathBuf {
        self.state.join("pods")
    }

    /// Returns the directory of one pod's files. `sandbox` is an id that this daemon created.
    pub(crate) fn pod(&self, sandbox: &str) -> PathBuf {
        self.pods().join(sandbox)
    }
}
