//! [`ErofsError`]: why a tar stream could not be converted.

use std::io;
use std::path::{Path, PathBuf};

/// Result of a conversion.
pub type ErofsResult<T> = Result<T, ErofsError>;

/// Error of a conversion.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// An entry of the archive is not acceptable.
    #[error("layer entry {entry:?}: {reason}")]
    Entry {
        /// Path of the entry, as far as it is printable.
        entry: String,
        /// Why it was rejected.
        reason: String,
    },
    /// The stream is damaged or ends early.
    #[error("{what} is corrupt: expected {expected}, got {got}")]
    Corrupt {
        /// Name of the stream.
        what: String,
        /// Expected content.
        expected: String,
        /// Content found.
        got: String,
    },
    /// The archive as a whole cannot be represented.
    #[error("{what}: {reason}")]
    Invalid {
        /// Name of the archive.
        what: String,
        /// Why it was rejected.
        reason: String,
    },
    /// A limit is exceeded.
    #[error("{what} exceeds the limit of {limit} {unit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// The limit, in `unit`.
        limit: u64,
        /// Unit of `limit`.
        unit: &'static str,
    },
    /// The image or the scratch file could not be read or written.
    #[error("{what} {}", .path.display())]
    Io {
        /// The operation.
        what: &'static str,
        /// Path of the image.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl ErofsError {
    pub(crate) fn io(what: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }
}
