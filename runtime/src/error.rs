//! [`RuntimeError`]: what a call of this crate can end with, and its [`ErrorKind`], from which cri-server makes a
//! gRPC status.
//!
//! Causes stay in `#[source]`; [`report`] prints the whole chain once, for a log line or a status message.

use boxlite_portal::{GuestErrorKind, PortalError};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Result of this crate's calls.
pub type Result<T> = std::result::Result<T, RuntimeError>;

/// The classes a caller may act on; the names are gRPC's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// No such box, container or image.
    NotFound,
    /// Its id or name is taken by something else.
    AlreadyExists,
    /// The caller's value is wrong.
    InvalidArgument,
    /// Right call, wrong state.
    FailedPrecondition,
    /// A limit of time ran out.
    DeadlineExceeded,
    /// Memory, disk, devices.
    ResourceExhausted,
    /// May work later: a VM or shim that is gone.
    Unavailable,
    /// Anything else.
    Internal,
}

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// Nothing has this id or name.
    #[error("{what} {id:?} not found")]
    NotFound {
        /// "box", "container".
        what: &'static str,
        /// What was asked for.
        id: String,
    },
    /// An id prefix that fits more than one.
    #[error("{what} id prefix {prefix:?} is ambiguous: {count} match")]
    AmbiguousId {
        /// "box", "container".
        what: &'static str,
        /// What was asked for.
        prefix: String,
        /// How many have it.
        count: usize,
    },
    /// The id or name is in use by something different.
    #[error("{what} {id:?} exists already: {reason}")]
    AlreadyExists {
        /// "box", "container".
        what: &'static str,
        /// Id or name.
        id: String,
        /// How the two differ.
        reason: String,
    },
    /// A value that cannot be.
    #[error("{field} = {value:?}: {reason}")]
    InvalidArgument {
        /// Name of the option.
        field: &'static str,
        /// What it was.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The state machine denied the request.
    #[error("box {id}: {denied}")]
    Denied {
        /// Box id.
        id: String,
        /// The policy's reason.
        denied: crate::management::box_state::Denied,
    },
    /// A container is in the wrong state for the request.
    #[error("container {id} is {state}: {reason}")]
    ContainerState {
        /// Container id.
        id: String,
        /// Its state.
        state: crate::types::ContainerState,
        /// What that forbids.
        reason: &'static str,
    },
    /// A stage of the start pipeline failed; what it had made is undone.
    #[error("box {id}: {stage} failed")]
    Start {
        /// Box id.
        id: String,
        /// Stage of the pipeline.
        stage: crate::metrics::Stage,
        /// Why; shared by all who waited for it.
        #[source]
        source: Arc<RuntimeError>,
    },
    /// The VM or its shim is gone.
    #[error("box {id} has no running VM: {reason}")]
    BoxGone {
        /// Box id.
        id: String,
        /// What happened to it.
        reason: String,
    },
    /// A program or file of the installation is missing.
    #[error("{what} is missing at {path}")]
    Missing {
        /// "guest agent", "guest kernel", "shim".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// The file system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A file operation failed.
    #[error("{what} {path}")]
    Io {
        /// What was being done: "cannot create".
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The database failed.
    #[error("database {path}: {what}")]
    Database {
        /// The file.
        path: PathBuf,
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The database was written by a version this one cannot read.
    #[error("database {path} has schema {found}, this version reads {known}")]
    DatabaseSchema {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The shim program did not do its `start` or `delete`.
    #[error("shim {action}: {reason}")]
    ShimProgram {
        /// "start", "delete", "probe".
        action: &'static str,
        /// Exit code and the end of its standard error.
        reason: String,
    },
    /// The shim answered a call with an error.
    #[error("shim refused {call}: {message}")]
    Shim {
        /// ttrpc method.
        call: &'static str,
        /// Class, from the ttrpc status code.
        kind: ErrorKind,
        /// The shim's words.
        message: String,
    },
    /// The connection to the shim failed in a call.
    #[error("shim connection failed in {call}: {reason}")]
    ShimConnection {
        /// ttrpc method.
        call: &'static str,
        /// ttrpc's words.
        reason: String,
    },
    /// A wait ran out.
    #[error("{what} did not happen within {limit:?}")]
    Deadline {
        /// What was awaited.
        what: String,
        /// For how long.
        limit: Duration,
    },
    /// A call into the guest failed.
    #[error("guest call failed")]
    Portal(#[from] PortalError),
    /// An image operation failed.
    #[error("image {image}: {what}")]
    Image {
        /// Reference or id.
        image: String,
        /// What was being done.
        what: &'static str,
        /// Class.
        kind: ErrorKind,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something shared with other callers failed; they all see this.
    #[error(transparent)]
    Shared(Arc<RuntimeError>),
    /// The daemon is going down.
    #[error("the runtime is shutting down")]
    ShuttingDown,
    /// A part of the program ended that must not; a bug.
    #[error("internal: {what}")]
    Internal {
        /// What was found.
        what: String,
    },
}

impl RuntimeError {
    /// The class of the error.
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
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                ErrorKind::ResourceExhausted
            }
            Self::Shim { kind, .. } | Self::Image { kind, .. } => *kind,
            Self::Deadline { .. } => ErrorKind::DeadlineExceeded,
            Self::Portal(error) => portal_kind(error),
            Self::Io { .. }
            | Self::Database { .. }
            | Self::DatabaseSchema { .. }
            | Self::ShimProgram { .. }
            | Self::Internal { .. } => ErrorKind::Internal,
        }
    }

    /// The stage of the start pipeline in which this happened.
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
            GuestErrorKind::InvalidArgument | GuestErrorKind::UserNotFound => {
                ErrorKind::InvalidArgument
            }
            GuestErrorKind::WrongState => ErrorKind::FailedPrecondition,
            GuestErrorKind::Resources => ErrorKind::ResourceExhausted,
            _ => ErrorKind::Internal,
        },
    }
}
