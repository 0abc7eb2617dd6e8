//! [`HostPodsError`]: errors of calls for host pods, with their gRPC codes. Errors that containerd answers pass unchanged.

use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::{Code, Status};

/// Reason why a call for a host pod fails before containerd answers it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostPodsError {
    /// containerd does not serve its socket, or the connection broke during the call.
    #[error("failed to reach the container runtime of host pods at unix://{}: {reason}", endpoint.display())]
    Unreachable { endpoint: PathBuf, reason: String },
    /// containerd holds the connection and does not answer.
    #[error("the container runtime of host pods at unix://{} did not answer within {} s", endpoint.display(), .limit.as_secs())]
    Timeout { endpoint: PathBuf, limit: Duration },
    /// The prefix of an id matches ids of VMs and of host pods, or several of host pods.
    #[error("invalid {subject} id prefix {prefix:?}: {count} ids match")]
    AmbiguousId {
        subject: &'static str,
        prefix: String,
        count: usize,
    },
    /// An image that only the other image store has could not be pulled for this pod.
    #[error(
        "image {reference:?} is not in the image store of the pod and could not be pulled: {reason}"
    )]
    Image { reference: String, reason: String },
}

impl HostPodsError {
    /// Creates the error of a call whose connection failed with `status`.
    pub(super) fn unreachable(endpoint: &Path, status: &Status) -> Self {
        // tonic's message ("transport error") does not contain the causes.
        let message = status.message();
        let reason = match std::error::Error::source(status) {
            Some(cause) => format!("{message}: {}", boxlite_runtime::report(cause)),
            None => message.to_owned(),
        };
        Self::Unreachable {
            endpoint: endpoint.to_owned(),
            reason,
        }
    }

    /// Returns the gRPC code.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Unreachable { .. } | Self::Timeout { .. } => Code::Unavailable,
            Self::AmbiguousId { .. } => Code::InvalidArgument,
            Self::Image { .. } => Code::NotFound,
        }
    }
}

impl From<HostPodsError> for Status {
    fn from(error: HostPodsError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
