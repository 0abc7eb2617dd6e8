//! [`Ext4`]: an ext4 on a loop device, for what the scratch directory's tmpfs does not have: it can be frozen, and old kernels
//! map its ids.

use crate::enclave::run;
use crate::outcome::Result;
use std::path::{Path, PathBuf};

/// Mounted at this path. Dropping it thaws and unmounts.
pub struct Ext4(PathBuf);

impl Ext4 {
    /// A new one of so many bytes in the sparse file `image`, mounted at `at`, which is made.
    pub fn mount(image: &Path, bytes: u64, at: &Path) -> Result<Self> {
        std::fs::File::create(image)?.set_len(bytes)?;
        std::fs::create_dir_all(at)?;
        let (image, target) = (image.display().to_string(), at.display().to_string());
        run("mkfs.ext4", &["-q", "-F", &image])?;
        run("mount", &["-o", "loop", &image, &target])?;
        Ok(Self(at.to_owned()))
    }

    /// Every write to it blocks from now on.
    pub fn freeze(&self) -> Result {
        run("fsfreeze", &["--freeze", &self.0.display().to_string()]).map(drop)
    }

    /// Lets them go on.
    pub fn thaw(&self) -> Result {
        run("fsfreeze", &["--unfreeze", &self.0.display().to_string()]).map(drop)
    }
}

impl Drop for Ext4 {
    fn drop(&mut self) {
        // Not frozen any more where the case went well.
        let _ = self.thaw();
        if let Err(error) = run("umount", &["--lazy", &self.0.display().to_string()]) {
            eprintln!("{error}");
        }
    }
}
