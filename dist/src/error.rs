//! [`DistError`]: the errors of packing.

use std::io;
use std::path::PathBuf;

pub(crate) type Result<T> = std::result::Result<T, DistError>;

/// Error of packing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DistError {
    /// A file or directory is unreadable.
    #[error("failed to read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The result is not written.
    #[error("failed to write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    /// An archive in memory cannot be built.
    #[error("failed to write archive")]
    Archive { source: io::Error },
    /// A package must not have this file.
    #[error("invalid file {path}: {reason}")]
    File { path: String, reason: &'static str },
    /// A document cannot be understood.
    #[error("failed to parse {name}")]
    Parse {
        name: &'static str,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The workspace has no such package.
    #[error("package {name} not found in the output of cargo metadata")]
    PackageNotFound { name: String },
    /// A file of another project is described incompletely.
    #[error("invalid file description {text}: expected NAME=VERSION=LICENSE=PATH")]
    ForeignFile { text: String },
}
