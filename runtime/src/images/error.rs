//! [`ImageError`]: errors of pulls and of the image store.
//!
//! cri-server maps [`ImageErrorKind`] to a gRPC status. Messages contain no secrets and no URLs with a query, which may
//! carry signatures and tokens.
//!
//! Errors are `Clone`, because one failed layer download may affect several callers.

use crate::failpoint::Injected;
use boxlite_erofs::ErofsError;
use boxlite_sys::storage_full::is_full;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Result of this module's functions.
pub type ImageResult<T> = Result<T, ImageError>;

/// Class of an [`ImageError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageErrorKind {
    /// The reference, digest or credentials are malformed.
    InvalidReference,
    /// Neither the store nor any registry host has it.
    NotFound,
    /// The registry rejected the credentials or requires some.
    Unauthorized,
    /// Content differs from its digest, size or format.
    Corrupt,
    /// The image is well formed but not acceptable: unsafe names in a layer, not a container image, unknown media type.
    InvalidImage,
    /// The image has no manifest for this machine's operating system and architecture.
    NoPlatform,
    /// A box still uses the image.
    InUse,
    /// The disk is full.
    NoSpace,
    /// Content is larger than this node accepts.
    TooLarge,
    /// The registry cannot be reached or returns an error; a retry may succeed.
    Unavailable,
    /// The node's registry configuration (`hosts.toml`, certificates) is invalid.
    Config,
    /// The pull was canceled.
    Cancelled,
    /// A system call on the node failed.
    Internal,
}

/// An image error. [`ImageError::report`] returns the message with its causes in one line.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// `reference` is not an image reference.
    #[error("invalid image reference {reference:?}: {reason}")]
    InvalidReference { reference: String, reason: String },
    /// The store has no such image, or the registries have no such manifest or blob.
    #[error("{subject} not found{}", at(.host))]
    NotFound {
        subject: String,
        host: Option<String>,
    },
    /// `host` denied access to `subject`.
    #[error("{host} denied access to {subject}: {reason}")]
    Unauthorized {
        host: String,
        subject: String,
        reason: String,
    },
    /// `host` returned an unexpected status.
    #[error("{host} returned status {status} for {subject}{}", detail(.message))]
    Status {
        host: String,
        subject: String,
        status: u16,
        message: String,
    },
    /// `host` could not be reached, stalled, or closed the connection.
    #[error("failed to get {subject} from {host}")]
    Transport {
        host: String,
        subject: String,
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// `host` violated the protocol.
    #[error("invalid response of {host} for {subject}: {reason}")]
    Protocol {
        host: String,
        subject: String,
        reason: String,
    },
    /// `host` sent fewer bytes than the configured minimum.
    #[error("{host} sends {subject} at {rate} bytes per second, the minimum is {minimum}")]
    TooSlow {
        host: String,
        subject: String,
        rate: u64,
        minimum: u64,
    },
    /// `subject` was not complete in time.
    #[error("{subject} not complete after {seconds} s")]
    TimedOut { subject: String, seconds: u64 },
    /// Every configured host failed; `attempts` lists the errors in order.
    #[error("failed to get {subject} from any host: {attempts}")]
    AllHosts {
        subject: String,
        attempts: String,
        kind: ImageErrorKind,
    },
    /// Content does not match its descriptor.
    #[error("{subject} is corrupt: expected {expected}, got {got}")]
    Corrupt {
        subject: String,
        expected: String,
        got: String,
    },
    /// The manifest, index or config is not acceptable.
    #[error("invalid {subject}: {reason}")]
    InvalidImage { subject: String, reason: String },
    /// An entry of a layer's tar stream is not acceptable.
    #[error("invalid layer entry {entry:?}: {reason}")]
    LayerEntry { entry: String, reason: String },
    /// The index has no entry for this machine.
    #[error("{subject} has no manifest for platform {wanted}; available: {offered}")]
    NoPlatform {
        subject: String,
        wanted: String,
        offered: String,
    },
    /// The image is held by `holders`.
    #[error("image {image} is in use by containers: {}", .holders.join(", "))]
    InUse { image: String, holders: Vec<String> },
    /// The file system of the image store is full.
    #[error("failed to {operation}: no space left on the file system of {}", .path.display())]
    NoSpace {
        operation: String,
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    /// `subject` is larger than `limit` (in `unit`).
    #[error("{subject} exceeds the limit of {limit} {unit}")]
    TooLarge {
        subject: String,
        limit: u64,
        unit: &'static str,
    },
    /// A configuration file or the store is invalid.
    #[error("invalid {}: {reason}", .path.display())]
    Config { path: PathBuf, reason: String },
    /// The caller dropped the pull.
    #[error("the pull was canceled")]
    Cancelled,
    /// A file operation failed.
    #[error("failed to {operation} {}", .path.display())]
    Io {
        operation: String,
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    /// A layer failed.
    #[error("failed to get layer {digest}")]
    Layer {
        digest: String,
        #[source]
        source: Box<ImageError>,
    },
    /// A pull failed.
    #[error("failed to pull image {reference:?}")]
    Pull {
        reference: String,
        #[source]
        source: Box<ImageError>,
    },
    /// A task of the store panicked.
    #[error("internal error: {subject} panicked")]
    Lost { subject: &'static str },
}

fn at(host: &Option<String>) -> String {
    host.as_ref()
        .map(|h| format!(" at {h}"))
        .unwrap_or_default()
}

fn detail(message: &str) -> String {
    if message.is_empty() {
        String::new()
    } else {
        format!(": {message}")
    }
}

impl ImageError {
    /// Returns the class of the error.
    pub fn kind(&self) -> ImageErrorKind {
        use ImageErrorKind as K;
        match self {
            Self::InvalidReference { .. } => K::InvalidReference,
            Self::NotFound { .. } => K::NotFound,
            Self::Unauthorized { .. } => K::Unauthorized,
            Self::Status { .. }
            | Self::Transport { .. }
            | Self::Protocol { .. }
            | Self::TooSlow { .. }
            | Self::TimedOut { .. } => K::Unavailable,
            Self::AllHosts { kind, .. } => *kind,
            Self::Corrupt { .. } => K::Corrupt,
            Self::InvalidImage { .. } | Self::LayerEntry { .. } => K::InvalidImage,
            Self::NoPlatform { .. } => K::NoPlatform,
            Self::InUse { .. } => K::InUse,
            Self::NoSpace { .. } => K::NoSpace,
            Self::TooLarge { .. } => K::TooLarge,
            Self::Config { .. } => K::Config,
            Self::Cancelled => K::Cancelled,
            Self::Io { .. } | Self::Lost { .. } => K::Internal,
            Self::Layer { source, .. } | Self::Pull { source, .. } => source.kind(),
        }
    }

    /// Returns true if a retry of the pull may succeed, so that partial downloads are worth keeping.
    pub fn is_transient(&self) -> bool {
        match self {
            // 408 and 429 are temporary; other 4xx are permanent.
            Self::Status { status, .. } => *status >= 500 || matches!(status, 408 | 429),
            Self::Layer { source, .. } | Self::Pull { source, .. } => source.is_transient(),
            other => matches!(
                other.kind(),
                ImageErrorKind::Unavailable | ImageErrorKind::Cancelled
            ),
        }
    }

    /// Returns the message followed by its causes, as a gRPC status shows it.
    pub fn report(&self) -> String {
        boxlite_sys::report::report(self)
    }

    /// Wraps an I/O error of the operation `what`, a verb, on `path`; a full disk becomes [`ImageError::NoSpace`].
    pub(super) fn io(what: impl Into<String>, path: &Path, source: io::Error) -> Self {
        let (what, path) = (what.into(), path.to_path_buf());
        match is_full(&source) {
            true => Self::NoSpace {
                operation: what,
                path,
                source: Arc::new(source),
            },
            false => Self::Io {
                operation: what,
                path,
                source: Arc::new(source),
            },
        }
    }

    /// Wraps a connection error. The URL is removed from the cause because it may carry a token.
    pub(super) fn transport(host: &str, what: impl Into<String>, source: reqwest::Error) -> Self {
        Self::Transport {
            host: host.into(),
            subject: what.into(),
            source: Arc::new(source.without_url()),
        }
    }

    /// Returns an error for content that does not match its descriptor.
    pub(super) fn corrupt(
        what: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Corrupt {
            subject: what.into(),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// Returns an error for an unacceptable manifest or config.
    pub(super) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidImage {
            subject: what.into(),
            reason: reason.into(),
        }
    }
}

impl From<Injected> for ImageError {
    fn from(injected: Injected) -> Self {
        Self::io("continue in", Path::new("the image store"), injected.into())
    }
}

impl From<ErofsError> for ImageError {
    fn from(error: ErofsError) -> Self {
        match error {
            ErofsError::Entry { entry, reason } => Self::LayerEntry { entry, reason },
            ErofsError::Corrupt {
                subject: what,
                expected,
                got,
            } => Self::Corrupt {
                subject: what,
                expected,
                got,
            },
            ErofsError::Invalid { subject, reason } => Self::InvalidImage { subject, reason },
            ErofsError::TooLarge {
                subject,
                limit,
                unit,
            } => Self::TooLarge {
                subject,
                limit,
                unit,
            },
            ErofsError::Cancelled => Self::Cancelled,
            ErofsError::Io {
                operation,
                path,
                source,
            } => Self::io(operation, &path, source),
        }
    }
}
