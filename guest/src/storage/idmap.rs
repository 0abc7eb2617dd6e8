//! ID-mapped mounts: views of a mount whose file owners are mapped by a user namespace.
//!
//! Used for the layers of a container in a user namespace: in an image root is user 0, but in the VM that container's root
//! has another ID. The system calls are in `boxlite_sys::idmap`.

use rustix::mount::{UnmountFlags, unmount};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// A mapped view of a mount. Unmounted when dropped; an overlay on it keeps its own reference.
#[derive(Debug)]
pub struct Mapped {
    target: PathBuf,
}

impl Mapped {
    /// Mounts a view of `source` on the existing directory `target`, mapped by `user_namespace`. Blocks.
    pub fn mount(source: &Path, target: &Path, user_namespace: BorrowedFd<'_>) -> io::Result<Self> {
        boxlite_sys::idmap::mount(source, target, user_namespace, false)?;
        Ok(Self {
            target: target.to_path_buf(),
        })
    }

    /// Returns the mount point.
    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(errno) = unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(%errno, target = %self.target.display(), "failed to unmount mapped layer");
        }
        let _ = std::fs::remove_dir(&self.target);
    }
}
