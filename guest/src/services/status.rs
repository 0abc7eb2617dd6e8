//! Conversion of the agent's errors to gRPC statuses: a code, the whole chain of causes as message, and the typed detail.

use crate::container::error::ContainerError;
use crate::execution::input::InputError;
use crate::network::NetworkError;
use crate::spawner::SpawnError;
use crate::spawner::wire::FailureKind;
use crate::status::from_error;
use crate::storage::StorageError;
use crate::system::SystemError;
use boxlite_proto::boxlite::v1::ErrorKind;
use tonic::Status;

fn storage_kind(error: &StorageError) -> (ErrorKind, String) {
    match error {
        StorageError::Mount { target, .. } | StorageError::Unmount { target, .. } => {
            (ErrorKind::Mount, target.clone())
        }
        StorageError::Path { path, .. } => (ErrorKind::Rootfs, path.clone()),
        StorageError::Escape { path, .. } => (ErrorKind::InvalidArgument, path.clone()),
        StorageError::NotMapped { path } => (ErrorKind::InvalidArgument, path.clone()),
        StorageError::NoDisk { serial, .. } => (ErrorKind::NotFound, serial.clone()),
        StorageError::TooManyLayers { .. } => {
            (ErrorKind::InvalidArgument, "rootfs.layers".to_owned())
        }
    }
}

impl From<StorageError> for Status {
    fn from(error: StorageError) -> Self {
        let (kind, subject) = storage_kind(&error);
        from_error(kind, &subject, &error)
    }
}

/// Returns kind and subject of a container's error; an error shared with an earlier call keeps its own.
fn container_kind(error: &ContainerError) -> (ErrorKind, String) {
    match error {
        ContainerError::NotFound { id, .. } => (ErrorKind::NotFound, id.clone()),
        ContainerError::WrongState { id, .. } => (ErrorKind::WrongState, id.clone()),
        ContainerError::Invalid { field, .. } => (ErrorKind::InvalidArgument, (*field).to_owned()),
        ContainerError::Limit { what, .. } => (ErrorKind::Resources, (*what).to_owned()),
        ContainerError::Storage(error) => storage_kind(error),
        ContainerError::Cgroup(_) => (ErrorKind::Resources, "cgroup".to_owned()),
        ContainerError::Spawn(SpawnError::Refused(failure)) => {
            let kind = match failure.kind {
                FailureKind::ExecutableNotFound => ErrorKind::ExecutableNotFound,
                FailureKind::UserNotFound => ErrorKind::UserNotFound,
                FailureKind::InvalidArgument => ErrorKind::InvalidArgument,
                FailureKind::Internal => ErrorKind::Internal,
            };
            (kind, "process".to_owned())
        }
        ContainerError::Spawn(_) => (ErrorKind::Internal, "spawner".to_owned()),
        ContainerError::User(_) => (ErrorKind::UserNotFound, "process.user".to_owned()),
        ContainerError::System(_) => (ErrorKind::InvalidArgument, "sysctl".to_owned()),
        ContainerError::Step { step, .. } => (ErrorKind::Internal, (*step).to_owned()),
        ContainerError::NoPod => (ErrorKind::WrongState, "guest".to_owned()),
        ContainerError::Shared(inner) => container_kind(inner),
    }
}

impl From<ContainerError> for Status {
    fn from(error: ContainerError) -> Self {
        let (kind, subject) = container_kind(&error);
        from_error(kind, &subject, &error)
    }
}

impl From<InputError> for Status {
    fn from(error: InputError) -> Self {
        let kind = match &error {
            InputError::Gap { .. } => ErrorKind::InvalidArgument,
            InputError::TooManyWriters => ErrorKind::Resources,
            InputError::None => ErrorKind::WrongState,
            InputError::Write(_) => ErrorKind::Internal,
        };
        from_error(kind, "input", &error)
    }
}

impl From<NetworkError> for Status {
    fn from(error: NetworkError) -> Self {
        let kind = match &error {
            NetworkError::Invalid { .. } => ErrorKind::InvalidArgument,
            NetworkError::NoCard { .. } => ErrorKind::NotFound,
            NetworkError::Socket(_) | NetworkError::Step { .. } => ErrorKind::Internal,
        };
        from_error(kind, "network", &error)
    }
}

impl From<SystemError> for Status {
    fn from(error: SystemError) -> Self {
        let (kind, subject) = match &error {
            SystemError::Sysctl { name, .. } => (ErrorKind::InvalidArgument, name.clone()),
            SystemError::Hostname { name, .. } => (ErrorKind::InvalidArgument, name.clone()),
            SystemError::Clock { .. } => (ErrorKind::Internal, "clock".to_owned()),
            SystemError::DropCaches(_) => (ErrorKind::Internal, "caches".to_owned()),
            SystemError::Entropy(_) => (ErrorKind::Internal, "entropy".to_owned()),
        };
        from_error(kind, &subject, &error)
    }
}
