//! ID-mapped mounts: a tree of files whose owners a user namespace maps, seen through a mount of its own.
//!
//! For the layers of a container in a user namespace: on disk an image's root is user 0, and in the VM that container's
//! root is another. The system calls are in `boxlite_sys::idmap`.

use rustix::mount::{UnmountFlags, unmount};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// A mapped view of a mount at a place of its own, unmounted when dropped: an overlay keeps what it needs of it.
#[derive(Debug)]
pub struct Mapped {
    target: PathBuf,
}

impl Mapped {
    /// Mounts what is at `source` on the existing directory `target`, mapped by `user_namespace`. Blocks.
    pub fn mount(source: &Path, target: &Path, user_namespace: BorrowedFd<'_>) -> io::Result<Self> {
        boxlite_sys::idmap::mount(source, target, user_namespace, false)?;
        Ok(Self {
            target: target.to_path_buf(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(errno) = unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(%errno, target = %self.target.display(), "unmount a mapped layer");
        }
        let _ = std::fs::remove_dir(&self.target);
    }
}
