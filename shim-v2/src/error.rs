//! [`ShimError`]: why a request to the shim failed, and the one conversion of it into a ttrpc status.
//!
//! containerd decides by the code (NotFound is fine for a Delete, FailedPrecondition for a Kill), people read the text.

use boxlite_portal::{GuestErrorKind, PortalError};
use boxlite_sys::report::Report;
use containerd_shim_protos::ttrpc;
use std::path::PathBuf;
use std::sync::Arc;

/// Result of the shim's services.
pub type Result<T> = std::result::Result<T, ShimError>;

/// Why a request failed. Clonable, since several callers may have waited for the same attempt.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ShimError {
    /// No such sandbox, container or process.
    #[error("{what} {id:?} not found")]
    NotFound { what: &'static str, id: String },
    /// The id is taken.
    #[error("{what} {id:?} already exists")]
    AlreadyExists { what: &'static str, id: String },
    /// Not in this state.
    #[error("{what} {id:?} is {state}: cannot {action}")]
    WrongState {
        what: &'static str,
        id: String,
        state: String,
        action: &'static str,
    },
    /// A value of the request that nothing can be done with.
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// A path of the host that a mount needs is not there, or is of a kind that cannot go into a VM.
    #[error("host path {path} for {wanted_for}: {reason}")]
    HostPath {
        path: PathBuf,
        wanted_for: String,
        reason: String,
    },
    /// A system call or file operation.
    #[error("{action} {path}")]
    Io {
        action: &'static str,
        path: String,
        #[source]
        source: Arc<std::io::Error>,
    },
    /// A step with the VM or its parts.
    #[error("{step}")]
    Boot {
        step: &'static str,
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The VM is not (or no longer) there.
    #[error("the VM of sandbox {id} has ended ({how})")]
    VmGone { id: String, how: String },
    /// The guest refused or did not answer.
    #[error(transparent)]
    Guest(Arc<PortalError>),
    /// Not built.
    #[error("{what} is not supported")]
    Unsupported { what: &'static str },
    /// The shim is ending.
    #[error("the shim is shutting down")]
    Ending,
}

impl From<PortalError> for ShimError {
    fn from(error: PortalError) -> Self {
        Self::Guest(Arc::new(error))
    }
}

impl ShimError {
    /// Wraps an I/O error with what was done to which path.
    pub fn io(
        action: &'static str,
        path: impl std::fmt::Display,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_string();
        move |source| Self::Io {
            action,
            path,
            source: Arc::new(source),
        }
    }

    /// Wraps the failure of a step of the VM's start.
    pub fn boot<E>(step: &'static str) -> impl FnOnce(E) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        move |source| Self::Boot {
            step,
            source: Arc::new(source),
        }
    }

    /// The ttrpc code containerd expects for this.
    pub fn code(&self) -> ttrpc::Code {
        match self {
            Self::NotFound { .. } => ttrpc::Code::NOT_FOUND,
            Self::AlreadyExists { .. } => ttrpc::Code::ALREADY_EXISTS,
            Self::WrongState { .. } => ttrpc::Code::FAILED_PRECONDITION,
            Self::Invalid { .. } | Self::HostPath { .. } => ttrpc::Code::INVALID_ARGUMENT,
            Self::Io { .. } | Self::Boot { .. } => ttrpc::Code::INTERNAL,
            Self::VmGone { .. } | Self::Ending => ttrpc::Code::UNAVAILABLE,
            Self::Unsupported { .. } => ttrpc::Code::UNIMPLEMENTED,
            Self::Guest(error) => guest_code(error),
        }
    }
}

fn guest_code(error: &PortalError) -> ttrpc::Code {
    match error {
        PortalError::Guest { kind, .. } => match kind {
            GuestErrorKind::NotFound | GuestErrorKind::ExecutableNotFound => ttrpc::Code::NOT_FOUND,
            GuestErrorKind::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
            GuestErrorKind::InvalidArgument
            | GuestErrorKind::UserNotFound
            | GuestErrorKind::Mount => ttrpc::Code::INVALID_ARGUMENT,
            GuestErrorKind::WrongState | GuestErrorKind::OutputGone => {
                ttrpc::Code::FAILED_PRECONDITION
            }
            GuestErrorKind::Resources => ttrpc::Code::RESOURCE_EXHAUSTED,
            GuestErrorKind::Rootfs | GuestErrorKind::Internal | GuestErrorKind::Unspecified => {
                ttrpc::Code::INTERNAL
            }
        },
        PortalError::Deadline { .. } | PortalError::ExecDeadline { .. } => {
            ttrpc::Code::DEADLINE_EXCEEDED
        }
        PortalError::Transport { .. } | PortalError::Connect { .. } => ttrpc::Code::UNAVAILABLE,
        PortalError::Protocol { .. } => ttrpc::Code::INTERNAL,
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), Report(&error)))
    }
}
