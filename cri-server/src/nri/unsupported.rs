//! [`Unsupported`]: the reason why a change that a plugin requests cannot be applied.

/// An adjustment that the runtime cannot apply.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{field}: {reason}")]
pub(crate) struct Unsupported {
    pub field: String,
    pub reason: String,
}
