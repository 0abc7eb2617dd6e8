//! Public data types of images: [`ImageRecord`], [`LayerFile`], [`RegistryOptions`], [`RegistryAuth`], [`PullProgress`]
//! and [`ImageFsInfo`].

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use oci_spec::image::ImageConfiguration;
use tokio::sync::watch;

/// An image in the store. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageRecord {
    /// `sha256:` and the digest of the image's config: CRI's image ID.
    pub id: String,
    /// References with a tag, normalized (`docker.io/library/busybox:latest`), sorted. Empty after its tags have moved.
    pub repo_tags: Vec<String>,
    /// References with a digest (`docker.io/library/busybox@sha256:…`), sorted.
    pub repo_digests: Vec<String>,
    /// Disk usage in bytes: layer files, manifest and config. Layers shared with other images count in full.
    pub size_bytes: u64,
    /// Diff IDs (`sha256:…`) of the layers, lowest first.
    pub layers: Vec<String>,
    /// Config of the image (entrypoint, environment, user …).
    pub config: Arc<ImageConfiguration>,
    /// Always false at present: images are kept by `ImageManager::hold`.
    pub pinned: bool,
}

/// Default user of an image, as CRI represents it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageUser {
    /// The config has no user: root.
    Unset,
    /// A user id.
    Uid(i64),
    /// A user name, to be looked up in the image's `/etc/passwd`.
    Name(String),
}

impl ImageRecord {
    /// Returns the user of the image's config without its group, for CRI's `Image.uid` and `Image.username`.
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

/// Layer file that a guest mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// Digest of the layer's uncompressed tar stream, `sha256:…`.
    pub diff_id: String,
    /// EROFS file, mode 0444 below a directory of mode 0700.
    pub path: PathBuf,
    /// Size in bytes, a multiple of 4096.
    pub bytes: u64,
}

/// Disk usage of the image store, for CRI's ImageFsInfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFsInfo {
    /// Directory of the store.
    pub path: PathBuf,
    /// Bytes allocated below it.
    pub used_bytes: u64,
    /// Number of files and directories below it.
    pub inodes_used: u64,
    /// Time of the count in ns since the epoch.
    pub timestamp_ns: i64,
}

/// Options for access to registries.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Directory in containerd's `certs.d` layout: `<host>/hosts.toml`, `_default/hosts.toml`. Need not exist.
    pub certs_dir: PathBuf,
    /// Timeout of a connection attempt, including TLS.
    pub connect_timeout: Duration,
    /// A response without a new byte for this time counts as broken. Also the window of `min_bytes_per_second`.
    pub stall_timeout: Duration,
    /// A layer download that is slower than this for `stall_timeout` counts as broken; 0 accepts any rate. The time in which
    /// the conversion does not accept bytes is not counted.
    pub min_bytes_per_second: u64,
    /// Maximum duration of a pull. Its partial downloads are kept for a retry.
    pub pull_timeout: Duration,
    /// Number of layers of a pull that are downloaded and converted concurrently.
    pub parallel_layers: usize,
    /// Maximum size of an uncompressed layer, in bytes of its tar stream.
    pub max_layer_bytes: u64,
    /// Maximum total size of partial downloads that are kept for a retry.
    pub max_partial_bytes: u64,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            certs_dir: PathBuf::from("/etc/boxlite/certs.d"),
            // containerd's dial timeout.
            connect_timeout: Duration::from_secs(30),
            // Pull-through caches may be slow to send the first byte.
            stall_timeout: Duration::from_secs(60),
            // Slower than a modem; a layer of 10 MiB would take three hours.
            min_bytes_per_second: 1024,
            // 64 GiB take as long at 5 MB/s.
            pull_timeout: Duration::from_secs(4 * 3600),
            // containerd's max_concurrent_downloads.
            parallel_layers: 3,
            // Larger than any published machine-learning image.
            max_layer_bytes: 64 << 30,
            // One large layer, or several ordinary ones.
            max_partial_bytes: 512 << 20,
        }
    }
}

/// Credentials of a pull, as in CRI's AuthConfig. `Debug` shows no secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RegistryAuth {
    /// User name for Basic authentication and for the token endpoint.
    pub username: String,
    /// Password.
    pub password: String,
    /// base64 of `username:password`; used if `username` is empty.
    pub auth: String,
    /// OAuth2 refresh token, exchanged at the token endpoint.
    pub identity_token: String,
    /// Bearer token, sent unchanged.
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

/// Channel for the progress of a pull. It does not block the pull; a slow reader sees the newest state.
pub type ProgressSender = watch::Sender<PullProgress>;

/// Progress of a pull.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PullProgress {
    /// Normalized reference.
    pub reference: String,
    /// Layers, lowest first; empty before the manifest is known.
    pub layers: Vec<LayerProgress>,
    /// Set by the last publication of a successful pull.
    pub done: bool,
}

/// Progress of a layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerProgress {
    /// Digest of the blob in the registry.
    pub digest: String,
    /// Size of the blob in bytes.
    pub total_bytes: u64,
    /// Bytes received, including those of an earlier attempt.
    pub received_bytes: u64,
    /// State.
    pub state: LayerState,
}

/// State of a layer's download.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LayerState {
    /// Waiting.
    #[default]
    Waiting,
    /// Being downloaded and converted to EROFS.
    Pulling,
    /// Downloaded; the last blocks are being written.
    Finishing,
    /// Was already in the store.
    Present,
    /// Added to the store.
    Done,
}
