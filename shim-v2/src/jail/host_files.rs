//! [`HostFiles`]: the files of the host that a VMM needs inside the jail. Data only; the jail module mounts them.

use std::path::PathBuf;

/// Absolute host paths, visible in the jail under the same names. What is not listed is not there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFiles {
    /// Files and directory trees, read-only.
    pub read_only: Vec<PathBuf>,
    /// Read-only where the host has them; silently left out otherwise (`/lib64`, `/etc/ld.so.cache`).
    pub optional: Vec<PathBuf>,
    /// Files, directories and device nodes that are written.
    pub read_write: Vec<PathBuf>,
    /// The virtiofs share: with everything that is mounted into it later.
    pub share: PathBuf,
    /// Becomes the working directory, so that socket names stay short. Writable.
    pub work_dir: PathBuf,
}
