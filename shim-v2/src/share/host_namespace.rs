//! [`HostNamespace`]: the mount namespace of the host, in which paths of the host are resolved.
//!
//! The shim's own namespace is a slave of the host's. On a node whose mounts are private (no systemd, or a container as the
//! node) it therefore shows the host's mounts as they were at the pod's start: a volume mounted later would be an empty
//! directory there. So sources of mounts are looked up and cloned in the host's namespace at the time of each call.

use crate::error::{Result, ShimError};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// A handle on the host's mount namespace. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HostNamespace(Option<Arc<File>>);

impl HostNamespace {
    /// Opens the mount namespace of the calling process.
    ///
    /// # Errors
    /// /proc is not mounted.
    pub fn current() -> io::Result<Self> {
        let namespace = File::open("/proc/thread-self/ns/mnt")?;
        Ok(Self(Some(Arc::new(namespace))))
    }

    /// Returns a handle for a process that has not left the host's namespace: [`HostNamespace::run`] remains on its thread.
    pub fn same() -> Self {
        Self(None)
    }

    /// Moves the calling thread into the namespace. The thread must have unshared its fs attributes (CLONE_FS).
    ///
    /// # Errors
    /// The kernel refused.
    pub fn enter(&self) -> io::Result<()> {
        match &self.0 {
            Some(namespace) => Ok(setns(&**namespace, CloneFlags::CLONE_NEWNS)?),
            None => Ok(()),
        }
    }

    /// Runs `work` on a short-lived thread in the namespace. Blocks.
    ///
    /// # Errors
    /// The thread could not be started or could not enter the namespace, or `work` panicked.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        if self.0.is_none() {
            return Ok(work());
        }
        let on_thread = || {
            unshare(CloneFlags::CLONE_FS)?;
            self.enter()?;
            Ok(work())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("host mounts".to_owned())
                .spawn_scoped(scope, on_thread)?;
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("thread panicked")))
        })
    }

    /// As [`HostNamespace::run`], on a blocking thread of the async runtime. Dropping the future does not stop `work`.
    ///
    /// # Errors
    /// Those of `work`; Io if it could not run.
    pub async fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let namespace = self.clone();
        let ran = tokio::task::spawn_blocking(move || namespace.run(work)).await;
        ran.map_err(|_| ShimError::Ending)?
            .map_err(ShimError::io("enter", "the host's mount namespace"))?
    }

    /// Clones the mount at `source`, with all mounts below it, into a detached tree. Links in `source` are followed. The
    /// clone is a peer of its original until its propagation is changed.
    ///
    /// # Errors
    /// Those of open_tree(2).
    pub fn clone_tree(&self, source: &Path) -> io::Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        Ok(self.run(|| open_tree(rustix::fs::CWD, source, flags))??)
    }
}
