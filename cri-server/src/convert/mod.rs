//! Conversion between CRI types and runtime types.
//!
//! The functions are pure except for reads of the host that a spec requires (mount sources, the limit of a cgroup,
//! devices); none calls the runtime. Flow: service → convert → BoxliteRuntime or LiteBox → convert → answer.

pub mod container;
pub mod filter;
pub mod image;
pub mod metrics;
pub mod sandbox;
pub mod signal;
pub mod size;
pub mod spec;
pub mod stats;
pub mod status;
pub mod time;
pub mod verbose;

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
    /// The VM does not fit into the pod's cgroup.
    #[error(
        "the pod's VM needs {vm_mib} MiB ({pod_mib} MiB for containers + {overhead_mib} MiB overhead) and the pod cgroup {cgroup} allows {limit_mib} MiB: give the RuntimeClass an overhead of at least {overhead_mib} MiB"
    )]
    TooSmall {
        vm_mib: u64,
        pod_mib: u64,
        overhead_mib: u64,
        limit_mib: u64,
        cgroup: String,
    },
    /// An update exceeds the VM's capacity.
    #[error("{0}; a running VM cannot grow: recreate the pod")]
    Beyond(String),
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
            ConvertError::TooSmall { .. } | ConvertError::Beyond(_) => {
                Self::resource_exhausted(message)
            }
        }
    }
}
