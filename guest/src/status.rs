//! [`status`]: builds gRPC statuses that carry the typed [`ErrorDetail`] as binary metadata under
//! `boxlite_proto::names::ERROR_METADATA`.

use boxlite_proto::boxlite::v1::{ErrorDetail, ErrorKind};
use boxlite_proto::names;
use boxlite_sys::report::report;
use prost::Message;
use std::error::Error;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// Maximum length of a status message in bytes; it travels in an HTTP/2 header.
const MAX_MESSAGE_BYTES: usize = 2048;

/// Creates a status of that kind about `subject`.
pub(crate) fn status(kind: ErrorKind, subject: &str, message: impl Into<String>) -> Status {
    let mut message = message.into();
    if message.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES)
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

/// Creates a status for an error with its causes.
pub(crate) fn from_error(kind: ErrorKind, subject: &str, error: &(dyn Error + 'static)) -> Status {
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

/// Returns the result of a blocking task that is never aborted, so it can fail only by a panic.
pub(crate) async fn joined<T>(task: tokio::task::JoinHandle<T>) -> Result<T, Status> {
    task.await
        .map_err(|error| Status::internal(error.to_string()))
}
