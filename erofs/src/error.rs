//! [`ErofsError`]: errors of a conversion.

use std::io;
use std::path::{Path, PathBuf};

/// Result of a conversion.
pub type ErofsResult<T> = Result<T, ErofsError>;

/// Error of a conversion.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// An entry of the archive is not acceptable.
    #[error("invalid layer entry {entry:?}: {reason}")]
    Entry {
        /// Printable path of the entry.
        entry: String,
        /// Reason of the rejection.
        reason: String,
    },
    /// The stream is damaged or ends early.
    #[error("{subject} is corrupt: expected {expected}, got {got}")]
    Corrupt {
        /// Name of the stream.
        subject: String,
        /// Expected content.
        expected: String,
        /// Content found.
        got: String,
    },
    /// The archive as a whole cannot be represented.
    #[error("invalid {subject}: {reason}")]
    Invalid {
        /// Name of the archive.
        subject: String,
        /// Reason of the rejection.
        reason: String,
    },
    /// A limit is exceeded.
    #[error("{subject} exceeds the limit of {limit} {unit}")]
    TooLarge {
        /// The excessive thing.
        subject: String,
        /// The limit, in `unit`.
        limit: u64,
        /// Unit of `limit`.
        unit: &'static str,
    },
    /// The result is no longer needed.
    #[error("the conversion was canceled")]
    Cancelled,
    /// The image or a temporary file could not be read or written.
    #[error("failed to {operation} {}", .path.display())]
    Io {
        /// Operation, as verb and object.
        operation: &'static str,
        /// Path of the image.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
}

impl ErofsError {
    pub(crate) fn io(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            operation,
            path: path.to_owned(),
            source,
        }
    }
}
