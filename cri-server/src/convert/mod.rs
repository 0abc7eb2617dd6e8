//! Conversion between CRI types and runtime types.
//!
//! The functions are pure except for reads of the host that a spec requires (mount sources, the limit of a cgroup,
//! devices); none calls the runtime. Flow: service → convert → BoxliteRuntime or LiteBox → convert → answer.

pub(crate) mod container;
pub(crate) mod filter;
pub(crate) mod image;
mod lsm;
pub(crate) mod metrics;
pub(crate) mod sandbox;
pub(crate) mod signal;
pub(crate) mod size;
pub(crate) mod spec;
pub(crate) mod stats;
pub(crate) mod status;
pub(crate) mod time;
mod userns;
pub(crate) mod verbose;

use boxlite_config::size::SizeError;

/// Reason why a request cannot be converted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConvertError {
    /// A required field is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has an invalid value.
    #[error("invalid {field} {value:?}: {reason}")]
    Invalid {
        field: &'static str,
        value: String,
        reason: String,
    },
    /// A valid request that this runtime does not support.
    #[error("unsupported {field} {value}: {reason}")]
    Unsupported {
        field: &'static str,
        value: String,
        reason: &'static str,
    },
    /// The host path of a mount cannot be used.
    #[error("failed to mount host path {host_path:?} at {container_path:?}: {reason}")]
    HostPath {
        host_path: String,
        container_path: String,
        reason: String,
    },
    /// The pod's VM cannot have this size.
    #[error(transparent)]
    Size(#[from] SizeError),
}

impl ConvertError {
    pub(crate) fn invalid(
        field: &'static str,
        value: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            field,
            value: value.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn unsupported(
        field: &'static str,
        value: impl Into<String>,
        reason: &'static str,
    ) -> Self {
        Self::Unsupported {
            field,
            value: value.into(),
            reason,
        }
    }
}

impl From<ConvertError> for tonic::Status {
    fn from(error: ConvertError) -> Self {
        let message = error.to_string();
        match error {
            ConvertError::Missing(_) | ConvertError::Invalid { .. } => {
                Self::invalid_argument(message)
            }
            ConvertError::Unsupported { .. } => Self::unimplemented(message),
            ConvertError::HostPath { .. } => Self::failed_precondition(message),
            ConvertError::Size(SizeError::TooLarge(_)) => Self::invalid_argument(message),
            ConvertError::Size(_) => Self::resource_exhausted(message),
        }
    }
}
