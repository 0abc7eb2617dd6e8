//! [`ImageManager`]: images, from a reference to the EROFS layer files a guest mounts.
//!
//! Starts no VM and knows no pod; paths below the store's directory are built in `store`. Used by the start pipeline
//! (`layers`, `hold`) and by cri-server's image service (everything else).
//!
//! ```text
//! pull: reference ─► registry (hosts, auth) ─► manifest (platform) ─► layer jobs ─► erofs ─► store (index, layers)
//! ```
//!
//! A pull resolves the reference anew each time, downloads what the store lacks, and adds the image in one step at its
//! end: before that nothing of it is visible, after that everything.

mod configs;
mod error;
mod layer;
mod manifest;
mod pull;
mod reference;
mod registry;
mod store;
#[cfg(test)]
mod tests;
mod types;

use std::path::Path;
use std::sync::Arc;

pub use error::{ImageError, ImageErrorKind, ImageResult};
pub use reference::{Digest, Reference};
pub use types::{
    ImageFsInfo, ImageRecord, ImageUser, LayerFile, LayerProgress, LayerState, ProgressSender,
    PullProgress, RegistryAuth, RegistryOptions,
};

use configs::Configs;
use layer::LayerJobs;
use registry::HostDirectory;
use store::Store;

/// The image store and the ways into it. Clones share it.
#[derive(Clone)]
pub struct ImageManager {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for ImageManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageManager")
            .field("options", &self.inner.options)
            .finish_non_exhaustive()
    }
}

struct Inner {
    store: Arc<Store>,
    jobs: LayerJobs,
    configs: Configs,
    hosts: HostDirectory,
    options: RegistryOptions,
}

impl ImageManager {
    /// Opens the store in `dir`, creating it (0700) if need be. One process at a time may have it open.
    ///
    /// Cleans up after a crash: incomplete files are deleted, recent partial downloads kept for the next pull, images
    /// with damaged or missing files dropped. Dropping the future lets the opening finish and close again.
    pub async fn open(dir: &Path, options: RegistryOptions) -> ImageResult<Self> {
        let path = dir.to_path_buf();
        let store = blocking(move || Store::open(&path)).await?;
        let inner = Inner {
            jobs: LayerJobs::new(store.clone()),
            configs: Configs::new(store.clone()),
            hosts: HostDirectory::new(options.clone()),
            store,
            options,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Pulls `reference` and gives the image it names now. `progress` sees every step; nobody has to read it.
    ///
    /// Errors are [`ImageError::Pull`] around the cause. A pull that fails for good leaves nothing; one that was cut off,
    /// or whose future was dropped, leaves partial downloads and complete layers that the next pull of them uses, and
    /// that any `remove` and the next `open` clean up.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<RegistryAuth>,
        progress: Option<ProgressSender>,
    ) -> ImageResult<ImageRecord> {
        pull::pull(&self.inner, reference, auth, progress).await
    }

    /// All images, ordered by ID. Never waits.
    pub fn list(&self) -> Vec<ImageRecord> {
        self.inner.store.list()
    }

    /// The image `what` names: an ID, a unique beginning of one, a tag or a digest reference. Never waits.
    pub fn status(&self, what: &str) -> Option<ImageRecord> {
        self.inner.store.find(what)
    }

    /// Removes the image `what` names with all its references, and every file no other image needs. False if there is
    /// none (which is no error to CRI). [`ImageError::InUse`] names the holders. Dropping the future doesn't stop it.
    pub async fn remove(&self, what: &str) -> ImageResult<bool> {
        let (store, what) = (self.inner.store.clone(), what.to_owned());
        blocking(move || store.remove(&what)).await
    }

    /// What the store takes on its disk.
    pub async fn fs_info(&self) -> ImageResult<ImageFsInfo> {
        let store = self.inner.store.clone();
        blocking(move || store.fs_info()).await
    }

    /// The layer files of the image with this ID (or another name of it), lowest first. Take a hold first: without one
    /// they may be deleted at any time.
    pub fn layers(&self, image: &str) -> ImageResult<Vec<LayerFile>> {
        let not_found = |what: String| ImageError::NotFound { what, host: None };
        let record = self
            .status(image)
            .ok_or_else(|| not_found(format!("image {image}")))?;
        record
            .layers
            .iter()
            .map(|layer| {
                let gone = || not_found(format!("layer {layer} of image {image}"));
                let digest = Digest::parse(layer).map_err(|_| gone())?;
                self.inner.store.layer(&digest)?.ok_or_else(gone)
            })
            .collect()
    }

    /// Keeps the image `what` names until `holder` releases it by the ID in the record this gives. Holding twice is
    /// holding once. Holds are in memory: after a restart, take them again before serving removals.
    pub fn hold(&self, what: &str, holder: &str) -> ImageResult<ImageRecord> {
        self.inner.store.hold(what, holder)
    }

    /// Ends the hold of `holder` on the image with this ID, if there is one.
    pub fn release(&self, image_id: &str, holder: &str) {
        self.inner.store.release(image_id, holder);
    }

    /// Waits until no thread of a dropped pull touches the store any more; each ends within one chunk or block write.
    pub async fn settle(&self) {
        self.inner.jobs.settle().await;
    }
}

/// Runs file work off the async threads. It runs to its end even if the future is dropped.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> ImageResult<T> + Send + 'static,
) -> ImageResult<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(ImageError::Lost {
            what: "work on the image store",
        }))
}
