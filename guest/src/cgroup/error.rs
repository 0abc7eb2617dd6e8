//! [`CgroupError`]: the errors of all operations on cgroups.

use std::io;

/// An error of an operation on a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Creating, removing or configuring the directory failed.
    #[error("failed to {step} cgroup {path}")]
    Directory {
        path: String,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// Writing a file failed.
    #[error("failed to write {value:?} to cgroup file {path}")]
    File {
        path: String,
        value: String,
        #[source]
        source: io::Error,
    },
    /// A resource setting is invalid.
    #[error("invalid resource {field}: {reason}")]
    Resource { field: String, reason: String },
}
