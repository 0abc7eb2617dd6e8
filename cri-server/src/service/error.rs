//! [`ServiceError`]: errors that the RPC handlers detect, with their gRPC codes.
//!
//! Errors of a request's fields are [`crate::convert::ConvertError`]s, errors of calls are those of the called crate. No other
//! file of this directory creates a [`Status`] from a code: `tests/errors.rs` checks that, and prints the list of all errors
//! into docs/errors.md.

use super::status_of;
use crate::cni::{CniError, PluginError};
use crate::nri::SessionError;
use crate::streaming::TooManyPending;
use boxlite_proto::names;
use boxlite_runtime::{BoxState, ContainerState, EventsEnd, RuntimeError};
use boxlite_sys::storage_full::is_full;
use std::path::PathBuf;
use std::time::Duration;
use tonic::{Code, Status};

/// Prefix of errors of image volumes, by which the kubelet counts them (`ErrImageVolumeMountFailed` of the CRI).
pub(crate) const IMAGE_VOLUME_FAILED: &str = "ImageVolumeMountFailed";

/// An error of an RPC handler.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServiceError {
    /// RunPodSandbox for a name that is in use.
    #[error("pod sandbox {name:?} already exists with id {id:?}")]
    PodExists { name: String, id: String },
    /// RunPodSandbox of this pod sandbox has not returned.
    #[error("pod sandbox {id:?} not found: it is still starting")]
    PodStarting { id: String },
    /// The RPC needs a ready pod sandbox.
    #[error("pod sandbox {id:?} is not ready: {}", pod_state(*state))]
    PodNotReady { id: String, state: BoxState },
    /// RunPodSandbox took longer than its configured timeout.
    #[error("pod sandbox {name:?} was not ready within {} s (timeouts.run_pod_seconds)", .limit.as_secs())]
    PodTimeout { name: String, limit: Duration },
    /// The network of a pod sandbox could not be set up or removed.
    #[error("failed to {operation} the network of pod sandbox {id:?}")]
    Network {
        operation: &'static str,
        id: String,
        #[source]
        source: Box<CniError>,
    },
    /// resolv.conf, hostname and hosts of a pod sandbox.
    #[error("failed to {operation} the files of pod sandbox {id:?} in {}", path.display())]
    PodFiles {
        operation: &'static str,
        id: String,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// CreateContainer for a name that is in use.
    #[error("container {name:?} already exists with id {id:?}")]
    ContainerExists { name: String, id: String },
    /// A call with the same name and another configuration is in progress.
    #[error("{subject} {key:?} is already being created by a different request")]
    InProgress { subject: &'static str, key: String },
    /// StartContainer of a running container.
    #[error("container {id:?} is already running")]
    ContainerStarted { id: String },
    /// The container is in the wrong state for the RPC.
    #[error("container {id:?} is {state}, not {required}")]
    ContainerState {
        id: String,
        state: ContainerState,
        required: ContainerState,
    },
    /// The directory of a container's log could not be created.
    #[error("failed to create log directory {} of container {name:?}", path.display())]
    LogDirectory {
        name: String,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A memory limit that would kill the container at once.
    #[error("invalid memory_limit_in_bytes \"{limit}\": container {id:?} uses {usage} bytes")]
    LimitBelowUsage { id: String, limit: u64, usage: u64 },
    /// The guest did not answer within the configured timeout.
    #[error("failed to get the stats of {subject} {id:?}: the VM did not answer within {} s (timeouts.stats_seconds)", .limit.as_secs_f32())]
    StatsTimeout {
        subject: &'static str,
        id: String,
        limit: Duration,
    },
    /// CreateContainer of an image that was not pulled.
    #[error("image {reference:?} not found: it must be pulled first")]
    ImageNotFound { reference: String },
    /// An image volume whose image was not pulled.
    #[error(
        "{IMAGE_VOLUME_FAILED}: image {reference:?} of the mount at {container_path:?} not found: it must be pulled first"
    )]
    ImageVolumeNotFound {
        reference: String,
        container_path: String,
    },
    /// An NRI plugin rejected the call, or its adjustments cannot be applied.
    #[error(transparent)]
    Plugin(#[from] SessionError),
    /// An NRI plugin's change of a container cannot be applied.
    #[error("failed to apply the adjustments of NRI plugins to container {id:?}: {reason}")]
    Adjustment { id: String, reason: String },
    /// Too many sessions of exec, attach and port-forward wait for their clients.
    #[error(transparent)]
    Sessions(#[from] TooManyPending),
    /// A follower of GetContainerEvents was too slow.
    #[error(transparent)]
    Events(#[from] EventsEnd),
    /// A call that this runtime does not implement.
    #[error("{call} is not implemented: it needs {prerequisite}")]
    Unimplemented {
        call: &'static str,
        prerequisite: &'static str,
    },
    /// A bug of this daemon.
    #[error("internal error: the handler of the call panicked, see the daemon's log")]
    Panicked,
    /// The daemon ends while the call is in progress.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

impl ServiceError {
    /// Adds the operation and the pod sandbox to an error of its network, for `map_err`.
    pub(crate) fn network(operation: &'static str, id: &str) -> impl FnOnce(CniError) -> Self {
        let id = id.to_owned();
        move |source| Self::Network {
            operation,
            id,
            source: Box::new(source),
        }
    }

    /// Returns the gRPC code.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::PodStarting { .. }
            | Self::ImageNotFound { .. }
            | Self::ImageVolumeNotFound { .. } => Code::NotFound,
            Self::PodExists { .. }
            | Self::ContainerExists { .. }
            | Self::InProgress { .. }
            | Self::ContainerStarted { .. } => Code::AlreadyExists,
            Self::PodNotReady { .. }
            | Self::ContainerState { .. }
            | Self::LimitBelowUsage { .. }
            | Self::Plugin(_)
            | Self::Adjustment { .. } => Code::FailedPrecondition,
            Self::PodTimeout { .. } | Self::StatsTimeout { .. } => Code::DeadlineExceeded,
            Self::Network { source, .. } => network_code(source),
            Self::PodFiles { source, .. } | Self::LogDirectory { source, .. }
                if is_full(source) =>
            {
                Code::ResourceExhausted
            }
            Self::Sessions(_) | Self::Events(EventsEnd::Behind { .. }) => Code::ResourceExhausted,
            Self::Unimplemented { .. } => Code::Unimplemented,
            Self::ShuttingDown | Self::Events(EventsEnd::Closing) => Code::Unavailable,
            Self::PodFiles { .. } | Self::LogDirectory { .. } | Self::Panicked => Code::Internal,
        }
    }
}

/// Describes the state of a pod sandbox.
fn pod_state(state: BoxState) -> &'static str {
    match state {
        BoxState::Created | BoxState::Starting => "it is starting",
        BoxState::Ready => "it has just become ready",
        BoxState::NotReady => "it was stopped, or its VM has ended",
        BoxState::Removing => "it is being removed",
    }
}

/// Returns the gRPC code of a network failure.
pub(crate) fn network_code(error: &CniError) -> Code {
    match error {
        CniError::Conf(_) => Code::FailedPrecondition,
        CniError::Plugin {
            source: PluginError::Timeout(_),
            ..
        } => Code::DeadlineExceeded,
        CniError::Plugin { .. }
        | CniError::NoAddress { .. }
        | CniError::Namespace { .. }
        | CniError::Record { .. } => Code::Internal,
    }
}

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        Self::new(error.code(), boxlite_runtime::report(&error))
    }
}

/// Returns the status of a failed creation, with the CRI's prefix if an image volume could not be mounted.
pub(crate) fn create_status(error: RuntimeError) -> Status {
    let status = status_of(error);
    if status.message().contains(names::IMAGE_SUB_PATH_STEP) {
        let message = format!("{IMAGE_VOLUME_FAILED}: {}", status.message());
        return Status::new(status.code(), message);
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_image_sub_path_gets_the_prefix_of_the_cri() {
        let error = |reason: &str| RuntimeError::BoxGone {
            id: "p".into(),
            reason: reason.into(),
        };
        let missing = format!(
            "{} x/y: No such file or directory",
            names::IMAGE_SUB_PATH_STEP
        );
        let status = create_status(error(&missing));
        assert!(status.message().starts_with("ImageVolumeMountFailed: "));
        assert!(status.message().contains("x/y"));
        assert!(
            !create_status(error("other"))
                .message()
                .contains("ImageVolume")
        );
    }
}
