//! [`ShimError`]: errors of requests to the shim, and their conversion into a ttrpc status.
//!
//! containerd acts on the code: it accepts NotFound for a Delete and FailedPrecondition for a Kill.

use boxlite_portal::{GuestErrorKind, PortalError};
use boxlite_sys::report::{Report, chain};
use boxlite_sys::storage_full::is_full;
use containerd_shim_protos::ttrpc;
use std::path::PathBuf;
use std::sync::Arc;

/// Result of the shim's services.
pub type Result<T> = std::result::Result<T, ShimError>;

/// Error of a request. Clonable, since several callers may wait for the same attempt.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ShimError {
    /// No such sandbox, container or process.
    #[error("{kind} {id:?} not found")]
    NotFound { kind: &'static str, id: String },
    /// The id is in use.
    #[error("{kind} {id:?} already exists")]
    AlreadyExists { kind: &'static str, id: String },
    /// The object's state does not allow the action.
    #[error("{kind} {id:?} is {state}: cannot {action}")]
    WrongState {
        kind: &'static str,
        id: String,
        state: String,
        action: &'static str,
    },
    /// An invalid value in the request.
    #[error("invalid {field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// A host path of a mount is missing or of a kind that cannot be mounted into a VM.
    #[error("invalid host path {path} for {required_by}: {reason}")]
    HostPath {
        path: PathBuf,
        required_by: String,
        reason: String,
    },
    /// Another pod mounts the directory with write access, and the configuration does not allow that.
    #[error(
        "volume {path} is writable in pod {other}, too: file locks do not reach beyond a pod, and pod.shared_volume_writers is \"refuse\""
    )]
    VolumeInUse { path: PathBuf, other: String },
    /// A failed system call or file operation; `action` is a verb.
    #[error("failed to {action} {path}")]
    Io {
        action: &'static str,
        path: String,
        #[source]
        source: Arc<std::io::Error>,
    },
    /// A failed step of the VM's start; `step` begins with a verb.
    #[error("failed to {step}")]
    Boot {
        step: &'static str,
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The VM has ended.
    #[error("the VM has ended: {reason}")]
    VmGone { reason: String },
    /// The guest returned an error or did not answer.
    #[error(transparent)]
    Guest(Arc<PortalError>),
    /// Not supported.
    #[error("{feature} is not supported")]
    Unsupported { feature: &'static str },
    /// The shim is shutting down.
    #[error("the shim is shutting down")]
    Ending,
}

impl From<PortalError> for ShimError {
    fn from(error: PortalError) -> Self {
        Self::Guest(Arc::new(error))
    }
}

impl ShimError {
    /// Wraps an I/O error with the action, a verb, and the path.
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

    /// Wraps the error of a step of the VM's start. `step` begins with a verb.
    pub fn boot<E>(step: &'static str) -> impl FnOnce(E) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        move |source| Self::Boot {
            step,
            source: Arc::new(source),
        }
    }

    /// Returns the ttrpc code that containerd expects.
    pub fn code(&self) -> ttrpc::Code {
        match self {
            Self::NotFound { .. } => ttrpc::Code::NOT_FOUND,
            Self::AlreadyExists { .. } => ttrpc::Code::ALREADY_EXISTS,
            Self::WrongState { .. } | Self::VolumeInUse { .. } => ttrpc::Code::FAILED_PRECONDITION,
            Self::Invalid { .. } | Self::HostPath { .. } => ttrpc::Code::INVALID_ARGUMENT,
            Self::Io { source, .. } if is_full(source) => ttrpc::Code::RESOURCE_EXHAUSTED,
            Self::Boot { source, .. } => boot_code(source.as_ref()),
            Self::Io { .. } => ttrpc::Code::INTERNAL,
            Self::VmGone { .. } | Self::Ending => ttrpc::Code::UNAVAILABLE,
            Self::Unsupported { .. } => ttrpc::Code::UNIMPLEMENTED,
            Self::Guest(error) => guest_code(error),
        }
    }
}

/// Returns the code of a failed start: that of an invalid value refused by the guest or of a full disk, otherwise INTERNAL.
fn boot_code(error: &(dyn std::error::Error + 'static)) -> ttrpc::Code {
    for cause in chain(error) {
        if let Some(error @ PortalError::Guest { kind, .. }) = cause.downcast_ref()
            && matches!(
                kind,
                GuestErrorKind::InvalidArgument | GuestErrorKind::Resources
            )
        {
            return guest_code(error);
        }
        if cause.downcast_ref::<std::io::Error>().is_some_and(is_full) {
            return ttrpc::Code::RESOURCE_EXHAUSTED;
        }
    }
    ttrpc::Code::INTERNAL
}

fn guest_code(error: &PortalError) -> ttrpc::Code {
    match error {
        PortalError::Guest { kind, .. } => match kind {
            GuestErrorKind::NotFound => ttrpc::Code::NOT_FOUND,
            GuestErrorKind::AlreadyExists => ttrpc::Code::ALREADY_EXISTS,
            GuestErrorKind::InvalidArgument
            | GuestErrorKind::UserNotFound
            | GuestErrorKind::ExecutableNotFound
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

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(kind: GuestErrorKind) -> PortalError {
        PortalError::Guest {
            call: "Guest.Init",
            kind,
            subject: String::new(),
            message: "refused".into(),
        }
    }

    #[test]
    fn full_disk_is_resource_exhausted() {
        let io = |errno| ShimError::io("create", "/d")(std::io::Error::from_raw_os_error(errno));
        assert_eq!(io(libc::ENOSPC).code(), ttrpc::Code::RESOURCE_EXHAUSTED);
        assert_eq!(io(libc::EDQUOT).code(), ttrpc::Code::RESOURCE_EXHAUSTED);
        assert_eq!(io(libc::EIO).code(), ttrpc::Code::INTERNAL);
        let full = ShimError::boot("create the scratch disk")(std::io::Error::from_raw_os_error(
            libc::ENOSPC,
        ));
        assert_eq!(full.code(), ttrpc::Code::RESOURCE_EXHAUSTED);
        let guest = ShimError::from(guest(GuestErrorKind::Resources));
        assert_eq!(guest.code(), ttrpc::Code::RESOURCE_EXHAUSTED);
    }

    /// As at an exec, which does not pass through the shim's service under boxlite-cri.
    #[test]
    fn missing_program_is_an_invalid_argument() {
        let error = ShimError::from(guest(GuestErrorKind::ExecutableNotFound));
        assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT);
    }

    #[test]
    fn boot_refused_by_the_guest_has_the_code_of_the_refusal() {
        let code = |kind| ShimError::boot("initialize the guest")(guest(kind)).code();
        assert_eq!(
            code(GuestErrorKind::InvalidArgument),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(code(GuestErrorKind::NotFound), ttrpc::Code::INTERNAL);
    }
}
