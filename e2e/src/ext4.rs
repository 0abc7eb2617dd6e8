//! [`Ext4`]: an ext4 file system on a loop device. Unlike the scratch directory's tmpfs it can be frozen, and old
//! kernels support ID-mapped mounts of it.

use crate::failure::Result;
use crate::namespaces::run;
use std::path::{Path, PathBuf};

/// An ext4 mounted at this path. Dropping it thaws and unmounts it.
pub(crate) struct Ext4(PathBuf);

impl Ext4 {
    /// Creates a file system of `bytes` bytes in the sparse file `image` and mounts it at `at`, which is created.
    pub(crate) fn mount(image: &Path, bytes: u64, at: &Path) -> Result<Self> {
        std::fs::File::create(image)?.set_len(bytes)?;
        std::fs::create_dir_all(at)?;
        let (image, target) = (image.display().to_string(), at.display().to_string());
        run("mkfs.ext4", &["-q", "-F", &image])?;
        run("mount", &["-o", "loop", &image, &target])?;
        Ok(Self(at.to_owned()))
    }

    /// Freezes the file system: every write blocks.
    pub(crate) fn freeze(&self) -> Result {
        run("fsfreeze", &["--freeze", &self.0.display().to_string()]).map(drop)
    }

    /// Thaws the file system.
    pub(crate) fn thaw(&self) -> Result {
        run("fsfreeze", &["--unfreeze", &self.0.display().to_string()]).map(drop)
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        // Already thawed unless the case failed.
        let _ = self.thaw();
        if let Err(error) = run("umount", &["--lazy", &self.0.display().to_string()]) {
            eprintln!("{error}");
        }
    }
}
