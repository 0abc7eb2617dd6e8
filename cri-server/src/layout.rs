//! The paths that are cri-server's own, below the daemon's two directories; everything else is the runtime's FilesystemLayout.
//!
//! ```text
//! root/cni/<sandbox id>.json     undo record of a pod's network
//! state/netns/<sandbox id>       the pod's network namespace (a bind mount)
//! state/pods/<sandbox id>/       resolv.conf, hostname, hosts
//! ```

use std::path::{Path, PathBuf};

/// Paths of cri-server's files.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
    state: PathBuf,
}

impl Layout {
    /// `root` persists, `state` ends with the boot.
    pub(crate) fn new(root: &Path, state: &Path) -> Self {
        Self {
            root: root.to_owned(),
            state: state.to_owned(),
        }
    }

    /// CNI records.
    pub(crate) fn cni_records(&self) -> PathBuf {
        self.root.join("cni")
    }

    /// Network namespaces.
    pub(crate) fn namespaces(&self) -> PathBuf {
        self.state.join("netns")
    }

    /// All pods' files.
    pub(crate) fn pods(&self) -> PathBuf {
        self.state.join("pods")
    }

    /// One pod's files. `sandbox` is an id this daemon made.
    pub(crate) fn pod(&self, sandbox: &str) -> PathBuf {
        self.pods().join(sandbox)
    }
}
