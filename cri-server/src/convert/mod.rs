//! CRI types to runtime types and back: the only place that knows both.
//!
//! Pure functions but for what a spec must look at on the host (mount sources, a cgroup's limit, the log directory); nothing here calls
//! the runtime. Flow: service → convert → one method of BoxliteRuntime or LiteBox → convert → answer.

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

/// A request that cannot become a pod or container.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConvertError {
    /// A field the CRI requires is not there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has a value that nothing can be made of.
    #[error("{field} = {value:?}: {reason}")]
    Invalid {
        field: &'static str,
        value: String,
        reason: String,
    },
    /// A valid wish that this runtime does not fulfil.
    #[error("{field} = {value}: {reason}")]
    Unsupported {
        field: &'static str,
        value: String,
        reason: &'static str,
    },
    /// A host path of a mount is not there.
    #[error("mount of {container_path:?}: host path {host_path:?}: {reason}")]
    HostPath {
        host_path: String,
        container_path: String,
        reason: String,
    },
    /// The VM would not fit into the pod's cgroup.
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
    /// An update asks for more than a VM has.
    #[error("{0}; a VM does not grow while it runs: the pod must be made anew")]
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
