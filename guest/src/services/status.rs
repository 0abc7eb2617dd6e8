//! Errors of the agent as gRPC statuses: a code, the whole chain of causes as message, and the typed
//! [`ErrorDetail`] as binary metadata under `boxlite_proto::names::ERROR_METADATA`.

use crate::boot::console::chain;
use crate::network::NetworkError;
use crate::storage::StorageError;
use crate::system::SystemError;
use boxlite_proto::boxlite::v1::{ErrorDetail, ErrorKind};
use boxlite_proto::names;
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
    status(kind, subject, chain(error))
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

impl From<StorageError> for Status {
    fn from(error: StorageError) -> Self {
        let (kind, subject) = match &error {
            StorageError::Mount { target, .. } | StorageError::Unmount { target, .. } => {
                (ErrorKind::Mount, target.clone())
            }
            StorageError::Path { path, .. } => (ErrorKind::Rootfs, path.clone()),
            StorageError::Escape { path, .. } => (ErrorKind::InvalidArgument, path.clone()),
            StorageError::NoDisk { serial, .. } => (ErrorKind::NotFound, serial.clone()),
            StorageError::TooManyLayers { .. } => {
                (ErrorKind::InvalidArgument, "rootfs.layers".to_owned())
            }
        };
        from_error(kind, &subject, &error)
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
