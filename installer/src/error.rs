//! [`InstallError`]: the errors that become node events and termination messages.

use std::io;
use std::path::PathBuf;

pub(crate) type Result<T> = std::result::Result<T, InstallError>;

/// Error of an installation or its removal.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallError {
    /// A file operation on the node or in the image.
    #[error("failed to {action} {}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The node's runtime has no drop-ins that this program writes.
    #[error("container runtime {found} not supported: {reason}")]
    Runtime { found: String, reason: &'static str },
    /// The runtime's configuration does not take effect with the drop-in.
    #[error("invalid configuration {}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    /// A command on the node.
    #[error("failed to run {command} on the node: {reason}")]
    Command { command: String, reason: String },
    /// A request to the API server.
    #[error("failed to {action}")]
    Api {
        action: String,
        source: reqwest::Error,
    },
    /// An answer of the API server other than success.
    #[error("failed to {action}: {status}: {message}")]
    Refused {
        action: String,
        status: u16,
        message: String,
    },
    /// A missing part of the pod's environment.
    #[error("{name} not found in the pod's environment")]
    Environment { name: &'static str },
    /// A pod of the RuntimeClass without a VM.
    #[error("the pod runs on the kernel of its node, {kernel}")]
    SameKernel { kernel: String },
    /// A state that was not reached in time.
    #[error("{awaited} not within {seconds} s; last seen: {seen}")]
    Timeout {
        awaited: String,
        seconds: u64,
        seen: String,
    },
}

/// Adds the operation and the path to an I/O error.
pub(crate) trait FileContext<T> {
    /// Returns the error as `failed to <action> <path>`.
    fn file(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T>;
}

impl<T> FileContext<T> for io::Result<T> {
    fn file(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T> {
        self.map_err(|source| InstallError::File {
            action,
            path: path.into(),
            source,
        })
    }
}
