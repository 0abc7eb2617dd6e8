//! [`ImageManager`]: pulls images and stores their layers as the EROFS files that guests mount.
//!
//! Independent of VMs and pods; paths below the store's directory are built in `store`. The start of containers uses
//! `layers` and `hold`, cri-server's image service uses the rest.
//!
//! ```text
//! pull: reference ─► registry (hosts, auth) ─► manifest (platform) ─► layer jobs ─► erofs ─► store (index, layers)
//! ```
//!
//! A pull always resolves the reference, downloads missing content, and adds the image atomically at its end.

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

use configs::ConfigCache;
use layer::LayerJobs;
use registry::HostDirectory;
use store::Store;

/// Handle to the image store. Clones share it.
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
    configs: ConfigCache,
    hosts: HostDirectory,
    options: RegistryOptions,
}

impl ImageManager {
    /// Opens the store in `dir`, or creates it (0700). One process at a time may open it.
    ///
    /// Cleans up after a crash: deletes incomplete files, keeps recent partial downloads for the next pull, and drops
    /// images with damaged or missing files.
    pub async fn open(dir: &Path, options: RegistryOptions) -> ImageResult<Self> {
        let path = dir.to_path_buf();
        let store = blocking(move || Store::open(&path)).await?;
        let inner = Inner {
            jobs: LayerJobs::new(store.clone(), &options),
            configs: ConfigCache::new(store.clone()),
            hosts: HostDirectory::new(options.clone()),
            store,
            options,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Pulls `reference` and returns the image. `progress` receives every step.
    ///
    /// Errors are [`ImageError::Pull`] with the cause. A pull that fails permanently removes its data. One that fails
    /// temporarily or is dropped leaves partial downloads and complete layers for the next pull; `remove` and `open` clean
    /// them up.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<RegistryAuth>,
        progress: Option<ProgressSender>,
    ) -> ImageResult<ImageRecord> {
        pull::pull(&self.inner, reference, auth, progress).await
    }

    /// Returns all images ordered by ID, without waiting.
    pub fn list(&self) -> Vec<ImageRecord> {
        self.inner.store.list()
    }

    /// Returns the image with this ID, unique ID prefix, tag or digest reference, without waiting.
    pub fn status(&self, what: &str) -> Option<ImageRecord> {
        self.inner.store.find(what)
    }

    /// Removes the image `what` with all its references, and the files that no other image needs. Returns false if it does
    /// not exist (not an error in CRI). [`ImageError::InUse`] names the holders. Dropping the future does not cancel it.
    pub async fn remove(&self, what: &str) -> ImageResult<bool> {
        let (inner, what) = (self.inner.clone(), what.to_owned());
        blocking(move || {
            let removed = inner.store.remove(&what)?;
            // A removal usually means that space is needed. It has succeeded whether or not the downloads can be deleted.
            if let Err(error) = inner.jobs.reclaim(0) {
                tracing::warn!(error = error.report(), "failed to delete partial downloads");
            }
            Ok(removed)
        })
        .await
    }

    /// Deletes partial downloads that are old or exceed the limit. Called regularly.
    pub async fn reclaim_partials(&self) -> ImageResult<()> {
        let inner = self.inner.clone();
        blocking(move || inner.jobs.reclaim(inner.options.max_partial_bytes)).await
    }

    /// Returns the number of damaged images, index files and layers that were found since the store was opened.
    pub fn quarantined(&self) -> u64 {
        self.inner.store.quarantined()
    }

    /// Returns the disk usage of the store.
    pub async fn fs_info(&self) -> ImageResult<ImageFsInfo> {
        let store = self.inner.store.clone();
        blocking(move || store.fs_info()).await
    }

    /// Returns the layer files of an image, lowest first. Hold the image first; otherwise they may be deleted.
    pub fn layers(&self, image: &str) -> ImageResult<Vec<LayerFile>> {
        let not_found = |what: String| ImageError::NotFound {
            subject: what,
            host: None,
        };
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

    /// Returns the layer files to stack as an overlay, lowest first: without repeats, of which the topmost counts, because
    /// overlayfs refuses to use a lower directory twice; and at least one, which is empty for an image without layers.
    ///
    /// The first call for a layer since the start verifies it in the background.
    pub fn overlay_layers(&self, image: &str) -> ImageResult<Vec<LayerFile>> {
        let layers = self.layers(image)?;
        let mut distinct: Vec<LayerFile> = Vec::with_capacity(layers.len());
        for layer in layers.into_iter().rev() {
            if !distinct.contains(&layer) {
                distinct.push(layer);
            }
        }
        distinct.reverse();
        if distinct.is_empty() {
            distinct.push(self.inner.store.empty_layer()?);
        }
        self.inner.store.verify_later(&distinct);
        Ok(distinct)
    }

    /// Keeps the image `what` until `holder` releases it by the ID in the returned record. Idempotent per holder. Holds are
    /// in memory: after a restart they must be taken again before removals are served.
    pub fn hold(&self, what: &str, holder: &str) -> ImageResult<ImageRecord> {
        self.inner.store.hold(what, holder)
    }

    /// Releases the hold of `holder` on the image with this ID, if there is one.
    pub fn release(&self, image_id: &str, holder: &str) {
        self.inner.store.release(image_id, holder);
    }

    /// Waits until the threads of dropped pulls have stopped using the store; each ends within one chunk or block write. Waits
    /// for the verification of layers, too.
    pub async fn wait_idle(&self) {
        self.inner.jobs.wait_idle().await;
        self.inner.store.verified().await;
    }
}

/// Runs blocking file operations on a blocking thread. They run to completion even if the future is dropped.
async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> ImageResult<T> + Send + 'static,
) -> ImageResult<T> {
    tokio::task::spawn_blocking(operation)
        .await
        .unwrap_or(Err(ImageError::Lost {
            subject: "a task of the image store",
        }))
}
