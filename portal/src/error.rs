//! [`PortalError`]: errors of calls into a guest, decoded from tonic's Status.
//!
//! Text from the guest is truncated to [`MAX_TEXT_BYTES`] and stripped of control characters, since it is logged.

use boxlite_proto::boxlite::v1::{ErrorDetail, ErrorKind};
use boxlite_proto::names;
use prost::Message;
use std::path::PathBuf;
use std::time::Duration;

/// Maximum size of an error text from a guest, in bytes.
pub const MAX_TEXT_BYTES: usize = 4 << 10;

/// Guest's classification of an error; see `ErrorKind` in service.proto.
pub type GuestErrorKind = ErrorKind;

/// Error of a call into a guest.
#[derive(Debug, thiserror::Error)]
pub enum PortalError {
    /// The agent answered with an error.
    #[error("{}", refusal(.subject, .message))]
    Guest {
        /// Name of the RPC, "Container.Init".
        call: &'static str,
        /// Kind of the error.
        kind: GuestErrorKind,
        /// Object of the error.
        subject: String,
        /// Message of the agent.
        message: String,
    },
    /// The guest did not answer within the call's deadline.
    #[error("the VM did not answer within {limit:?}")]
    Deadline {
        /// Name of the rpc.
        call: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// The connection broke or could not be established.
    #[error("lost the connection to the VM")]
    Transport {
        /// Name of the rpc.
        call: &'static str,
        /// Status of tonic.
        #[source]
        source: Box<tonic::Status>,
    },
    /// Failed to connect to the unix socket of the VM.
    #[error("failed to connect to the VM at {path}")]
    Connect {
        /// The unix socket.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The guest violated the protocol.
    #[error("invalid answer of the VM: {what}")]
    Protocol {
        /// Name of the rpc.
        call: &'static str,
        /// Violation.
        what: String,
    },
    /// A process in the guest was killed because it exceeded the caller's limit.
    #[error("{what} did not end within {limit:?} and was killed")]
    ExecDeadline {
        /// The command.
        what: String,
        /// The caller's limit.
        limit: Duration,
    },
}

impl PortalError {
    /// Converts a Status.
    pub fn from_status(call: &'static str, status: tonic::Status) -> Self {
        use tonic::Code;
        let detail = status
            .metadata()
            .get_bin(names::ERROR_METADATA)
            .and_then(|value| value.to_bytes().ok())
            .and_then(|bytes| ErrorDetail::decode(bytes).ok());
        if let Some(detail) = detail {
            return Self::Guest {
                call,
                kind: detail.kind(),
                subject: clean(&detail.subject),
                message: clean(status.message()),
            };
        }
        // A status created by tonic has a source (the transport's error); an agent's status has none.
        let transport = std::error::Error::source(&status).is_some();
        let kind = match status.code() {
            _ if transport => None,
            Code::Unavailable | Code::Cancelled | Code::Unknown => None,
            Code::NotFound => Some(ErrorKind::NotFound),
            Code::AlreadyExists => Some(ErrorKind::AlreadyExists),
            Code::InvalidArgument | Code::OutOfRange => Some(ErrorKind::InvalidArgument),
            Code::FailedPrecondition => Some(ErrorKind::WrongState),
            _ => Some(ErrorKind::Internal),
        };
        match kind {
            Some(kind) => Self::Guest {
                call,
                kind,
                subject: String::new(),
                message: clean(status.message()),
            },
            None => Self::Transport {
                call,
                source: Box::new(status),
            },
        }
    }

    /// Returns the guest's classification, if the guest answered.
    pub fn guest_kind(&self) -> Option<GuestErrorKind> {
        match self {
            Self::Guest { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    /// Returns true if the call may succeed on a new connection.
    pub fn is_transport(&self) -> bool {
        matches!(self, Self::Transport { .. } | Self::Connect { .. })
    }

    /// Returns true if the object of the call does not exist.
    pub fn is_not_found(&self) -> bool {
        self.guest_kind() == Some(ErrorKind::NotFound)
    }
}

/// Returns the guest's message, prefixed by the subject unless the message names it or the subject is only a field's name.
fn refusal(subject: &str, message: &str) -> String {
    let field = subject == "process" || subject.starts_with("process.");
    match subject.is_empty() || field || message.contains(subject) {
        true => message.to_owned(),
        false => format!("{subject:?}: {message}"),
    }
}

/// Truncates and sanitizes guest text for logs.
pub fn clean(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end]
        .chars()
        .map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::metadata::MetadataValue;

    #[test]
    fn detail_is_decoded() {
        let mut status = tonic::Status::internal("no such program");
        let detail = ErrorDetail {
            kind: ErrorKind::ExecutableNotFound.into(),
            subject: "sh".into(),
        };
        status.metadata_mut().insert_bin(
            names::ERROR_METADATA,
            MetadataValue::from_bytes(&detail.encode_to_vec()),
        );
        let error = PortalError::from_status("Execution.Exec", status);
        assert_eq!(error.guest_kind(), Some(ErrorKind::ExecutableNotFound));
        assert_eq!(error.to_string(), "\"sh\": no such program");
        for field in ["process", "process.user"] {
            assert_eq!(refusal(field, "unable to find user"), "unable to find user");
        }
    }

    #[test]
    fn plain_codes_are_kinds_and_unavailable_is_transport() {
        let kind = |status| PortalError::from_status("Guest.Ping", status).guest_kind();
        assert_eq!(
            kind(tonic::Status::not_found("x")),
            Some(ErrorKind::NotFound)
        );
        assert_eq!(
            kind(tonic::Status::data_loss("x")),
            Some(ErrorKind::Internal)
        );
        assert!(
            PortalError::from_status("Guest.Ping", tonic::Status::unavailable("x")).is_transport()
        );
    }

    #[test]
    fn guest_text_is_bounded_and_cleaned() {
        let text = clean(&format!("a\u{1b}[31mb{}", "é".repeat(MAX_TEXT_BYTES)));
        assert!(text.starts_with("a\u{fffd}[31mb"));
        assert!(text.len() <= MAX_TEXT_BYTES + 8);
    }
}
