//! The pod's scratch disk: a sparse file with an empty ext4, made anew for every boot. Its size is the pod's quota.
//!
//! No journal: the disk never outlives its VM.

use crate::error::{Result, ShimError};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;

/// Smallest disk that an ext4 is worth making on, in bytes.
const SMALLEST: u64 = 16 << 20;

/// Makes the disk at `path`.
///
/// # Errors
/// Invalid for a size too small, Io where the file or its file system cannot be made.
pub async fn make(path: &Path, bytes: u64) -> Result<()> {
    if bytes < SMALLEST {
        return Err(ShimError::Invalid {
            field: "scratch_bytes",
            reason: format!("{bytes}, at least {SMALLEST}"),
        });
    }
    let failed = |source| ShimError::io("make the scratch disk", path.display())(source);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    file.set_len(bytes).map_err(failed)?;
    drop(file);
    // lazy_itable_init: the file is all zeros, which is what an inode table is initialised to.
    let output = tokio::process::Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal"])
        .args(["-E", "lazy_itable_init=1,nodiscard"])
        .arg(path)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(ShimError::io("run", "mke2fs"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(std::io::Error::other(format!(
            "mke2fs: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        )))),
    }
}
