//! The pod's scratch disk: a sparse file with an empty ext4, created for each boot. Its size is the pod's quota.
//!
//! No journal: the disk is removed with its VM.

use crate::error::{Result, ShimError};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Stdio;

/// Minimum size of the disk in bytes.
const MIN_BYTES: u64 = 16 << 20;

/// Creates the disk at `path`.
///
/// # Errors
/// Invalid if the size is too small, Io if the file or its file system cannot be created.
pub(crate) async fn create(path: &Path, bytes: u64) -> Result<()> {
    if bytes < MIN_BYTES {
        return Err(ShimError::Invalid {
            field: "scratch_bytes",
            reason: format!("{bytes} is less than {MIN_BYTES}"),
        });
    }
    let failed = |source| ShimError::io("create scratch disk", path.display())(source);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    file.set_len(bytes).map_err(failed)?;
    drop(file);
    // lazy_itable_init: the file is all zeros, so inode tables need no initialization.
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
