//! Outcome of a remote command in the encoding of its protocol version: metav1.Status as JSON since v4, plain text
//! before.

use bytes::Bytes;
use serde_json::{Value, json};

/// Outcome of an exec or attach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Exit code 0, or the end of an attach.
    Success,
    /// Another exit code.
    Exit(u32),
    /// Not executed, with the reason.
    Failed(String),
}

impl Outcome {
    /// Returns the message for the error stream, if there is one.
    pub(crate) fn message(&self, json: bool) -> Option<Bytes> {
        if json {
            return Some(self.status().to_string().into());
        }
        match self {
            Self::Success => None,
            failure => Some(failure.text().into()),
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Success => String::new(),
            Self::Exit(code) => {
                format!("command terminated with non-zero exit code: exit status {code}")
            }
            Self::Failed(reason) => format!("Internal error occurred: {reason}"),
        }
    }

    fn status(&self) -> Value {
        match self {
            Self::Success => json!({ "metadata": {}, "status": "Success" }),
            Self::Exit(code) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.text(),
                "reason": "NonZeroExitCode",
                "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
            }),
            Self::Failed(_) => json!({
                "metadata": {},
                "status": "Failure",
                "message": self.text(),
                "reason": "InternalError",
                "code": 500,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_is_encoded_by_protocol_version() {
        let status: Value =
            serde_json::from_slice(&Outcome::Exit(7).message(true).unwrap()).unwrap();
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(
            status["details"]["causes"][0],
            json!({ "reason": "ExitCode", "message": "7" })
        );
        let status: Value =
            serde_json::from_slice(&Outcome::Success.message(true).unwrap()).unwrap();
        assert_eq!(status["status"], "Success");
        assert_eq!(Outcome::Success.message(false), None);
        let text = Outcome::Exit(7).message(false).unwrap();
        assert!(String::from_utf8_lossy(&text).ends_with("exit status 7"));
    }
}
