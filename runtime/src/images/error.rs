//! [`ImageError`]: everything that can go wrong between an image reference and its layer files.
//!
//! Holds no policy: what a kind means to a CRI client is decided in cri-server, from [`ImageErrorKind`]. No secret and
//! no URL with a query (they carry signatures and tokens) ever becomes part of a message.
//!
//! Errors are `Clone`, since one layer download may fail for several callers at once.

use boxlite_erofs::ErofsError;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Result of everything in this module.
pub type ImageResult<T> = Result<T, ImageError>;

/// The class of an [`ImageError`], for callers that map it to a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ImageErrorKind {
    /// The reference, digest or credentials are malformed.
    InvalidReference,
    /// Neither the store nor any registry host knows it.
    NotFound,
    /// The registry refused the credentials, or wants some.
    Unauthorized,
    /// Content differs from its digest, size or format.
    Corrupt,
    /// The image is well formed and not acceptable: unsafe names in a layer, no container image, unknown media type.
    InvalidImage,
    /// The image has nothing for this machine's operating system and architecture.
    NoPlatform,
    /// A box still uses the image.
    InUse,
    /// The disk is full.
    NoSpace,
    /// Something is larger than this node accepts.
    TooLarge,
    /// The registry can't be reached or answers an error; trying again may help.
    Unavailable,
    /// The node's registry configuration (`hosts.toml`, certificates) is wrong.
    Config,
    /// The caller went away while the work was under way.
    Cancelled,
    /// A system call on the node failed.
    Internal,
}

/// What went wrong with an image. [`ImageError::report`] gives the message with its causes in one line.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// `reference` is no image reference.
    #[error("image reference {reference:?}: {reason}")]
    InvalidReference { reference: String, reason: String },
    /// The store has no such image, or the registries have no such manifest or blob.
    #[error("{what} not found{}", at(.host))]
    NotFound { what: String, host: Option<String> },
    /// `host` refused to give `what`.
    #[error("{host} refuses {what}: {reason}")]
    Unauthorized {
        host: String,
        what: String,
        reason: String,
    },
    /// `host` answered with an unexpected status.
    #[error("{host} answered {status} for {what}{}", detail(.message))]
    Status {
        host: String,
        what: String,
        status: u16,
        message: String,
    },
    /// `host` could not be reached, stalled, or cut the connection.
    #[error("{what} from {host}")]
    Transport {
        host: String,
        what: String,
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// `host` broke the protocol.
    #[error("{host}: {what}: {reason}")]
    Protocol {
        host: String,
        what: String,
        reason: String,
    },
    /// Every configured host failed; `attempts` says how, in their order.
    #[error("{what}: {attempts}")]
    AllHosts {
        what: String,
        attempts: String,
        kind: ImageErrorKind,
    },
    /// Content is not what its descriptor promises.
    #[error("{what} is corrupt: expected {expected}, got {got}")]
    Corrupt {
        what: String,
        expected: String,
        got: String,
    },
    /// The manifest, index or config can't be used.
    #[error("{what}: {reason}")]
    InvalidImage { what: String, reason: String },
    /// An entry of a layer's tar stream can't be accepted.
    #[error("layer entry {entry:?}: {reason}")]
    LayerEntry { entry: String, reason: String },
    /// The index has no entry for this machine.
    #[error("{what} has nothing for {wanted}; it offers {offered}")]
    NoPlatform {
        what: String,
        wanted: String,
        offered: String,
    },
    /// The image is held by `holders`.
    #[error("image {image} is in use by {}", .holders.join(", "))]
    InUse { image: String, holders: Vec<String> },
    /// The file system of the image store is full.
    #[error("no space left for {what} on the file system of {}", .path.display())]
    NoSpace {
        what: String,
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    /// `what` is larger than `limit` (in `unit`).
    #[error("{what} exceeds the limit of {limit} {unit}")]
    TooLarge {
        what: String,
        limit: u64,
        unit: &'static str,
    },
    /// A registry configuration file is wrong.
    #[error("registry configuration {}: {reason}", .path.display())]
    Config { path: PathBuf, reason: String },
    /// The caller dropped the pull.
    #[error("the pull was cancelled")]
    Cancelled,
    /// `what` failed on `path`.
    #[error("{what} {}", .path.display())]
    Io {
        what: String,
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    /// A layer failed; the cause says how.
    #[error("layer {digest}")]
    Layer {
        digest: String,
        #[source]
        source: Box<ImageError>,
    },
    /// A pull failed; the cause says how.
    #[error("pulling {reference}")]
    Pull {
        reference: String,
        #[source]
        source: Box<ImageError>,
    },
    /// A task of the store ended without an answer (a panic).
    #[error("{what} ended without an answer")]
    Lost { what: &'static str },
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
    /// The class of the error.
    pub fn kind(&self) -> ImageErrorKind {
        use ImageErrorKind as K;
        match self {
            Self::InvalidReference { .. } => K::InvalidReference,
            Self::NotFound { .. } => K::NotFound,
            Self::Unauthorized { .. } => K::Unauthorized,
            Self::Status { .. } | Self::Transport { .. } | Self::Protocol { .. } => K::Unavailable,
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

    /// Whether the same pull may well succeed later, so that what has been downloaded is worth keeping.
    pub fn is_transient(&self) -> bool {
        match self {
            // 408 and 429 ask for patience; any other 4xx will be the same next time.
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

    /// An I/O error while `what` was done to `path`; a full disk becomes [`ImageError::NoSpace`].
    pub(super) fn io(what: impl Into<String>, path: &Path, source: io::Error) -> Self {
        let (what, path) = (what.into(), path.to_path_buf());
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace {
                what,
                path,
                source: Arc::new(source),
            },
            _ => Self::Io {
                what,
                path,
                source: Arc::new(source),
            },
        }
    }

    /// `host` could not be reached or cut the connection. The URL is taken out of the cause: it may carry a token.
    pub(super) fn transport(host: &str, what: impl Into<String>, source: reqwest::Error) -> Self {
        Self::Transport {
            host: host.into(),
            what: what.into(),
            source: Arc::new(source.without_url()),
        }
    }

    /// Content that isn't what its descriptor says.
    pub(super) fn corrupt(
        what: impl Into<String>,
        expected: impl Into<String>,
        got: impl Into<String>,
    ) -> Self {
        Self::Corrupt {
            what: what.into(),
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// A manifest or config that can't be used.
    pub(super) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidImage {
            what: what.into(),
            reason: reason.into(),
        }
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
                what,
                expected,
                got,
            },
            ErofsError::Invalid {
                subject: what,
                reason,
            } => Self::InvalidImage { what, reason },
            ErofsError::TooLarge {
                subject: what,
                limit,
                unit,
            } => Self::TooLarge { what, limit, unit },
            ErofsError::Cancelled => Self::Cancelled,
            ErofsError::Io {
                operation,
                path,
                source,
            } => Self::io(operation, &path, source),
        }
    }
}
