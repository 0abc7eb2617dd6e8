//! [`HostFiles`]: the host files that a VMM needs inside the jail.

use std::path::PathBuf;

/// Part of /proc that is visible in the jail, read-only.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProcFiles {
    /// All files, for the processes of the jail.
    #[default]
    All,
    /// Only /proc/self/fd, with the descriptors of the process that enters the jail.
    OwnDescriptors,
}

/// Absolute host paths, visible in the jail under the same names. Other paths do not exist there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostFiles {
    /// Files and directory trees, read-only.
    pub read_only: Vec<PathBuf>,
    /// Read-only if the host has them, otherwise omitted (`/lib64`, `/etc/ld.so.cache`).
    pub optional: Vec<PathBuf>,
    /// Writable files, directories and device nodes.
    pub read_write: Vec<PathBuf>,
    /// The virtiofs share, including mounts made in it later.
    pub share: PathBuf,
    /// Files of /proc in the jail.
    pub proc: ProcFiles,
    /// Working directory in the jail, writable, so that socket names are short.
    pub work_dir: PathBuf,
}
