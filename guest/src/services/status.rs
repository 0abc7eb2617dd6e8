//! Errors of the agent as gRPC statuses: a code, the whole chain of causes as message, and the typed
//! [`ErrorDetail`] as binary metadata under `boxlite_proto::names::ERROR_METADATA`.

use crate::container::ContainerError;
use crate::execution::input::InputError;
use crate::network::NetworkError;
use crate::spawner::SpawnError;
use crate::spawner::wire::FailureKind;
use crate::storage::StorageError;
use crate::system::SystemError;
use boxlite_proto::boxlite::v1::{ErrorDetail, ErrorKind};
use boxlite_proto::names;
use boxlite_sys::report::report;
use prost::Message;
use std::error::Error;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// Longest message of a status, in bytes: it travels in an HTTP/2 header.
const MESSAGE_LIMIT: usize = 2048;

/// A status of that kind about `subject`.
pub fn status(kind: ErrorKind, subject: &str, message: impl Into<String>) -> Status {
    let mut message = message.into();
    if message.len() > MESSAGE_LIMIT {
        let end = (0..=MESSAGE_LIMIT)
            .rev()
            .find(|end| message.is_char_boundary(*end))
            .unwrap_or(0);
        message.truncate(end);
    }
    let detail = ErrorDetail {
        kind: kind.into(),
        subject: subject.to_owned(),
    };
    let mut metadata = MetadataMap::new();
    metadata.insert_bin(
        names::ERROR_METADATA,
        MetadataValue::from_bytes(&detail.encode_to_vec()),
    );
    Status::with_metadata(code_of(kind), message, metadata)
}

/// A status for an error with causes.
pub fn from_error(kind: ErrorKind, subject: &str, error: &(dyn Error + 'static)) -> Status {
    status(kind, subject, report(error))
}

fn code_of(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::InvalidArgument | ErrorKind::UserNotFound | ErrorKind::ExecutableNotFound => {
            Code::InvalidArgument
        }
        ErrorKind::WrongState => Code::FailedPrecondition,
        ErrorKind::Resources => Code::ResourceExhausted,
        ErrorKind::OutputGone => Code::OutOfRange,
        ErrorKind::Rootfs | ErrorKind::Mount | ErrorKind::Internal | ErrorKind::Unspecified => {
            Code::Internal
        }
    }
}

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

/// Kind and subject of a container's error; one that was shared with an earlier call is told as its own.
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
            SystemError::Entropy(_) => (ErrorKind::Internal, "entropy".to_owned()),
        };
        from_error(kind, &subject, &error)
    }
}
