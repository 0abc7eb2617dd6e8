//! [`RuntimeError`]: the errors of this crate, and their [`ErrorKind`], which cri-server maps to a gRPC status.
//!
//! CRI clients see these texts, so they name the object in CRI's terms (pod sandbox, container, image). Causes are kept
//! in `#[source]`; [`crate::report()`] prints the whole chain once, for a log line or a status message.

use crate::failpoint::Injected;
use boxlite_portal::{GuestErrorKind, PortalError};
use boxlite_sys::storage_full::is_full;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Result of this crate's calls.
pub type Result<T> = std::result::Result<T, RuntimeError>;

/// Error classes that callers can act on; the names are gRPC's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The pod sandbox, container or image does not exist.
    NotFound,
    /// The id or name is in use.
    AlreadyExists,
    /// A value is invalid.
    InvalidArgument,
    /// The object is in the wrong state.
    FailedPrecondition,
    /// A timeout expired.
    DeadlineExceeded,
    /// Memory, disk space or devices are exhausted.
    ResourceExhausted,
    /// The VM or shim is gone; a retry may succeed.
    Unavailable,
    /// Any other error.
    Internal,
}

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// No object has this id or name.
    #[error("{subject} {id:?} not found")]
    NotFound {
        /// "pod sandbox", "container".
        subject: &'static str,
        /// Requested id or name.
        id: String,
    },
    /// More than one id has this prefix.
    #[error("invalid {subject} id prefix {prefix:?}: {count} ids match")]
    AmbiguousId {
        /// "pod sandbox", "container".
        subject: &'static str,
        /// Requested prefix.
        prefix: String,
        /// Number of matching ids.
        count: usize,
    },
    /// The id or name is used by another object.
    #[error("{subject} {id:?} already exists: {reason}")]
    AlreadyExists {
        /// "pod sandbox", "container".
        subject: &'static str,
        /// Id or name.
        id: String,
        /// Difference between the two.
        reason: String,
    },
    /// A value is invalid.
    #[error("invalid {field} {value:?}: {reason}")]
    InvalidArgument {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: String,
        /// Reason.
        reason: String,
    },
    /// The state machine denied the request.
    #[error("pod sandbox {id:?} is not available: {denied}")]
    Denied {
        /// Sandbox id.
        id: String,
        /// Reason.
        denied: crate::box_state::Denied,
    },
    /// A container is in the wrong state for the request.
    #[error("container {id:?} is {state}: {reason}")]
    ContainerState {
        /// Container id.
        id: String,
        /// Present state.
        state: crate::types::ContainerState,
        /// Required state.
        reason: &'static str,
    },
    /// A stage of the start pipeline failed and was undone.
    #[error("failed to start pod sandbox {id:?} in {stage}")]
    Start {
        /// Sandbox id.
        id: String,
        /// Stage of the pipeline.
        stage: crate::metrics::Stage,
        /// Cause, shared by all callers that joined the start.
        #[source]
        source: Arc<RuntimeError>,
    },
    /// The VM or its shim has ended.
    #[error("pod sandbox {id:?} is not running: {reason}")]
    BoxGone {
        /// Sandbox id.
        id: String,
        /// Reason.
        reason: String,
    },
    /// A program or file of the installation is missing or unusable.
    #[error("failed to use {subject} at {path}")]
    Missing {
        /// "guest agent", "guest kernel", "shim".
        subject: &'static str,
        /// Expected path.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// A file operation failed.
    #[error("failed to {operation} {path}")]
    Io {
        /// Operation as a verb: "create".
        operation: &'static str,
        /// File or directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// A database operation failed.
    #[error("failed to {operation} in database {path}")]
    Database {
        /// Database file.
        path: PathBuf,
        /// Operation, as verb and object.
        operation: &'static str,
        /// Cause.
        #[source]
        source: rusqlite::Error,
    },
    /// The database was written by a newer version.
    #[error("database {path} has schema version {found}, this daemon supports {known}")]
    DatabaseSchema {
        /// Database file.
        path: PathBuf,
        /// Version of the file.
        found: i64,
        /// Supported version.
        known: i64,
    },
    /// An action of the shim binary failed.
    #[error("failed to run the shim's action {action:?}: {reason}")]
    ShimProgram {
        /// "start", "delete", "probe".
        action: &'static str,
        /// Exit status and stderr.
        reason: String,
    },
    /// The shim returned an error.
    #[error("failed to {action}: {message}")]
    Shim {
        /// Operation, as verb and object: `start container "c1"`.
        action: String,
        /// Class, from the ttrpc status code.
        kind: ErrorKind,
        /// Message of the shim.
        message: String,
    },
    /// The connection to the shim failed.
    #[error("failed to {action}: lost the connection to the shim: {reason}")]
    ShimConnection {
        /// Operation, as verb and object.
        action: String,
        /// ttrpc's error.
        reason: String,
    },
    /// A timeout expired.
    #[error("{detail} within {limit:?}")]
    Deadline {
        /// Sentence that "within 5s" completes: "the shim did not exit".
        detail: String,
        /// Timeout.
        limit: Duration,
    },
    /// A call into the guest failed.
    #[error(transparent)]
    Portal(#[from] PortalError),
    /// A call into the guest failed, with the operation's object.
    #[error("failed to {action}")]
    Guest {
        /// Operation, as verb and object: `run a command in container "c1"`.
        action: String,
        /// Cause.
        #[source]
        source: PortalError,
    },
    /// An image operation failed.
    #[error("failed to {operation} image {image:?}")]
    Image {
        /// Reference or id.
        image: String,
        /// Operation as a verb.
        operation: &'static str,
        /// Class.
        kind: ErrorKind,
        /// Cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The error of an operation that several callers share.
    #[error(transparent)]
    Shared(Arc<RuntimeError>),
    /// The daemon is shutting down.
    #[error("the runtime is shutting down")]
    ShuttingDown,
    /// A bug or an unexpected condition.
    #[error("internal error: {detail}")]
    Internal {
        /// Description.
        detail: String,
    },
}

impl From<Injected> for RuntimeError {
    fn from(injected: Injected) -> Self {
        Self::Internal {
            detail: injected.to_string(),
        }
    }
}

impl RuntimeError {
    /// Adds the operation and its object to an error of the guest.
    pub(crate) fn guest(action: String) -> impl FnOnce(PortalError) -> Self {
        move |source| Self::Guest { action, source }
    }

    /// Returns the class of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::AmbiguousId { .. } | Self::InvalidArgument { .. } => ErrorKind::InvalidArgument,
            Self::Denied { .. } | Self::ContainerState { .. } => ErrorKind::FailedPrecondition,
            Self::Start { source, .. } | Self::Shared(source) => source.kind(),
            Self::BoxGone { .. } | Self::ShimConnection { .. } | Self::ShuttingDown => {
                ErrorKind::Unavailable
            }
            Self::Missing { .. } => ErrorKind::FailedPrecondition,
            Self::Io { source, .. } if is_full(source) => ErrorKind::ResourceExhausted,
            Self::Database { source, .. }
                if source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull) =>
            {
                ErrorKind::ResourceExhausted
            }
            Self::Shim { kind, .. } | Self::Image { kind, .. } => *kind,
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Portal(error) | Self::Guest { source: error, .. } => portal_kind(error),
            Self::Io { .. }
            | Self::Database { .. }
            | Self::DatabaseSchema { .. }
            | Self::ShimProgram { .. }
            | Self::Internal { .. } => ErrorKind::Internal,
        }
    }

    /// Returns the failed stage of the start pipeline.
    pub fn stage(&self) -> Option<crate::metrics::Stage> {
        match self {
            Self::Start { stage, .. } => Some(*stage),
            Self::Shared(source) => source.stage(),
            _ => None,
        }
    }
}

fn portal_kind(error: &PortalError) -> ErrorKind {
    match error {
        PortalError::Deadline { .. } | PortalError::ExecDeadline { .. } => {
            ErrorKind::DeadlineExceeded
        }
        PortalError::Transport { .. } | PortalError::Connect { .. } => ErrorKind::Unavailable,
        PortalError::Protocol { .. } => ErrorKind::Internal,
        PortalError::Guest { kind, .. } => match kind {
            GuestErrorKind::NotFound => ErrorKind::NotFound,
            GuestErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
            GuestErrorKind::InvalidArgument
            | GuestErrorKind::UserNotFound
            | GuestErrorKind::ExecutableNotFound => ErrorKind::InvalidArgument,
            GuestErrorKind::WrongState => ErrorKind::FailedPrecondition,
            GuestErrorKind::Resources => ErrorKind::ResourceExhausted,
            GuestErrorKind::OutputGone
            | GuestErrorKind::Rootfs
            | GuestErrorKind::Mount
            | GuestErrorKind::Internal
            | GuestErrorKind::Unspecified => ErrorKind::Internal,
        },
    }
}
