//! ID-mapped mounts: views of a mount whose file owners are mapped by a user namespace.
//!
//! Used for the layers of a container in a user namespace, and of its image volumes: in an image root is user 0, but in the VM that container's root
//! has another ID. The system calls are in `boxlite_sys::idmap`.

use super::StorageError;
use rustix::mount::{UnmountFlags, unmount};
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// A mapped view of a mount. Unmounted when dropped; an overlay on it keeps its own reference.
#[derive(Debug)]
pub(crate) struct Mapped {
    target: PathBuf,
}

impl Mapped {
    /// Mounts a view of `source` on the existing directory `target`, mapped by `user_namespace`. Blocks.
    pub(crate) fn mount(
        source: &Path,
        target: &Path,
        user_namespace: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        boxlite_sys::idmap::mount(source, target, user_namespace, false)?;
        Ok(Self {
            target: target.to_path_buf(),
        })
    }

    /// Mounts views of image layers on new directories `l<index>` below `directory`. Blocks.
    ///
    /// # Errors
    /// If a directory cannot be created or a view cannot be mounted. Earlier views are unmounted.
    pub(crate) fn mount_layers(
        layers: &[PathBuf],
        directory: &Path,
        user_namespace: BorrowedFd<'_>,
    ) -> Result<Vec<Self>, StorageError> {
        let mut mapped = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            let target = directory.join(format!("l{index}"));
            fs::create_dir_all(&target).map_err(StorageError::path("create directory", &target))?;
            let view = Self::mount(layer, &target, user_namespace).map_err(|source| {
                StorageError::Mount {
                    fstype: "mapped layer".to_owned(),
                    origin: layer.display().to_string(),
                    target: target.display().to_string(),
                    source,
                }
            })?;
            mapped.push(view);
        }
        Ok(mapped)
    }

    /// Returns the mount point.
    pub(crate) fn path(&self) -> &Path {
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
