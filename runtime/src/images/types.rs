//! The data other parts of the runtime hold about images: [`ImageRecord`], [`LayerFile`], [`RegistryOptions`],
//! [`RegistryAuth`], [`PullProgress`] and [`ImageFsInfo`].
//!
//! No behaviour beyond reading fields; how they come about is in `pull`, `store` and `registry`.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::image::ImageConfiguration;
use tokio::sync::watch;

/// An image of the store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageRecord {
    /// `sha256:` and the digest of the image's config: CRI's image ID.
    pub id: String,
    /// References with a tag, normalised (`docker.io/library/busybox:latest`), sorted. Empty once the tags have moved.
    pub repo_tags: Vec<String>,
    /// References with a digest (`docker.io/library/busybox@sha256:…`), sorted.
    pub repo_digests: Vec<String>,
    /// Bytes the image takes on this node's disk: layer files, manifest and config. Layers shared with other images count in full.
    pub size_bytes: u64,
    /// Diff IDs (`sha256:…`) of the layers, lowest first.
    pub layers: Vec<String>,
    /// The image's config (entrypoint, environment, user …).
    pub config: Arc<ImageConfiguration>,
    /// Never set today: images are kept by holding them, see `ImageManager::hold`.
    pub pinned: bool,
}

/// The user a container of the image runs as, the way CRI splits it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageUser {
    /// The config names nobody: root.
    Unset,
    /// A number.
    Uid(i64),
    /// A name, to be looked up in the image's `/etc/passwd`.
    Name(String),
}

impl ImageRecord {
    /// The user of the image's config without its group, as CRI's `Image.uid` and `Image.username` want it.
    pub fn user(&self) -> ImageUser {
        let user = self
            .config
            .config()
            .as_ref()
            .and_then(|c| c.user().as_deref())
            .unwrap_or("");
        let user = user.split(':').next().unwrap_or("");
        match user.parse::<i64>() {
            _ if user.is_empty() => ImageUser::Unset,
            Ok(uid) => ImageUser::Uid(uid),
            Err(_) => ImageUser::Name(user.to_owned()),
        }
    }
}

/// One layer as the guest mounts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// Digest of the layer's uncompressed tar stream, `sha256:…`.
    pub diff_id: String,
    /// The EROFS file, read-only, mode 0444 below a directory of mode 0700.
    pub path: PathBuf,
    /// Its size in bytes, a multiple of 4096.
    pub bytes: u64,
}

/// What CRI's ImageFsInfo wants to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFsInfo {
    /// The directory that holds everything about images.
    pub path: PathBuf,
    /// Bytes allocated below it.
    pub used_bytes: u64,
    /// Files and directories below it.
    pub inodes_used: u64,
    /// When that was counted, in nanoseconds since 1970.
    pub timestamp_ns: i64,
}

/// How this node reaches registries.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Directory in containerd's `certs.d` layout: `<host>/hosts.toml`, `_default/hosts.toml`. Need not exist.
    pub certs_dir: PathBuf,
    /// Limit of one connection attempt, TLS included.
    pub connect_timeout: Duration,
    /// A response that gives no byte for so long counts as cut.
    pub stall_timeout: Duration,
    /// Layers of one pull that are downloaded and converted at the same time.
    pub parallel_layers: usize,
    /// Largest uncompressed layer, in bytes of its tar stream.
    pub max_layer_bytes: u64,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            certs_dir: PathBuf::from("/etc/boxlite/certs.d"),
            // What containerd's transport allows a dial.
            connect_timeout: Duration::from_secs(30),
            // Registries that fetch from behind may need a while for the first byte; a minute is past any of them.
            stall_timeout: Duration::from_secs(60),
            // containerd's max_concurrent_downloads.
            parallel_layers: 3,
            // Past the largest published machine-learning images, and less than fills a node in one go.
            max_layer_bytes: 64 << 30,
        }
    }
}

/// Credentials of one pull, as CRI's AuthConfig has them. Its `Debug` shows no secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RegistryAuth {
    /// User name for Basic, and for the token endpoint.
    pub username: String,
    /// Its password.
    pub password: String,
    /// base64 of `username:password`; used when `username` is empty.
    pub auth: String,
    /// OAuth2 refresh token, exchanged at the token endpoint.
    pub identity_token: String,
    /// Bearer token, sent as it is.
    pub registry_token: String,
    /// If set, the credentials are for this host (or URL) only.
    pub server_address: String,
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryAuth")
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// Where a pull publishes how far it is. A watch never blocks the pull; a slow reader sees the newest state.
pub type ProgressSender = watch::Sender<PullProgress>;

/// How far a pull is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullProgress {
    /// The normalised reference.
    pub reference: String,
    /// The layers, lowest first; empty until the manifest is there.
    pub layers: Vec<LayerProgress>,
    /// Set with the last publication of a pull that succeeded.
    pub done: bool,
}

/// How far one layer is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerProgress {
    /// Digest of the blob as the registry has it.
    pub digest: String,
    /// Its size in bytes.
    pub total_bytes: u64,
    /// Bytes read of it so far, those of an earlier attempt included.
    pub received_bytes: u64,
    /// What is being done.
    pub state: LayerState,
}

/// What is being done to a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LayerState {
    /// Waiting for its turn.
    #[default]
    Waiting,
    /// Downloaded, and converted to EROFS as it arrives.
    Pulling,
    /// Everything is here; the last blocks are being written.
    Finishing,
    /// Was in the store before, by diff ID.
    Present,
    /// In the store now.
    Done,
}
