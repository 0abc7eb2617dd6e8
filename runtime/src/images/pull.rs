//! A pull, from a reference to an image in the store. Called by `ImageManager::pull`.
//!
//! This file has the sequence only: requests are in `registry`, documents in `manifest`, layers in `layer`.
//!
//! resolve (indexes down to this platform) → config (shared by all callers) → lease → layers, a few at a time → commit. A
//! failure gives up the lease and, if it is permanent, deletes the downloaded layers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt, TryStreamExt};

use super::error::{ImageError, ImageErrorKind, ImageResult};
use super::layer::LayerRequest;
use super::manifest::{self, Document, MAX_CONFIG_BYTES, MAX_INDEX_DEPTH, Manifest, Platform};
use super::reference::{Digest, Reference};
use super::registry::Session;
use super::store::NewImage;
use super::types::{ImageRecord, LayerProgress, LayerState, ProgressSender, RegistryAuth};
use super::{Inner, blocking};

/// A resolved reference.
struct Resolved {
    /// Digest of the document that the reference names.
    target: Digest,
    documents: Vec<(Digest, Vec<u8>)>,
    manifest: Manifest,
}

pub(super) async fn pull(
    inner: &Arc<Inner>,
    text: &str,
    auth: Option<RegistryAuth>,
    progress: Option<ProgressSender>,
) -> ImageResult<ImageRecord> {
    let reference = Reference::parse(text)?;
    let progress = Progress(progress);
    progress.start(&reference);
    let limit = inner.options.pull_timeout;
    let outcome = tokio::time::timeout(limit, run(inner, &reference, auth, &progress)).await;
    let outcome = outcome.unwrap_or_else(|_| {
        Err(ImageError::TimedOut {
            subject: "the download".into(),
            seconds: limit.as_secs(),
        })
    });
    outcome.map_err(|e| ImageError::Pull {
        reference: reference.to_string(),
        source: Box::new(e),
    })
}

async fn run(
    inner: &Arc<Inner>,
    reference: &Reference,
    auth: Option<RegistryAuth>,
    progress: &Progress,
) -> ImageResult<ImageRecord> {
    let platform = Platform::host();
    let session = Arc::new(Session::new(&inner.hosts, reference, auth)?);
    let resolved = resolve(&session, reference, platform).await?;
    let manifest = resolved.manifest;
    let what = format!("config {} of {}", manifest.config.digest, reference.name());
    let config = inner
        .configs
        .obtain(&manifest.config.digest, || {
            session.small_blob(&what, &manifest.config, MAX_CONFIG_BYTES)
        })
        .await?;
    if let Some(first) = manifest.ignored.first() {
        let count = manifest.ignored.len();
        tracing::info!(manifest = %resolved.target, count, media_type = first, "ignoring blobs that are not layers");
    }
    let (_, diff_ids) = manifest::parse_config(&what, &config, manifest.layers.len(), platform)?;
    let abandoned = Arc::new(AtomicBool::new(false));
    let requests: Vec<LayerRequest> = manifest
        .layers
        .into_iter()
        .zip(&diff_ids)
        .map(|(blob, diff_id)| LayerRequest {
            blob,
            diff_id: diff_id.clone(),
            max_bytes: inner.options.max_layer_bytes,
            abandoned: abandoned.clone(),
        })
        .collect();
    progress.layers(&requests);
    let lease = inner.store.lease(&diff_ids);
    let outcome = match fetch_layers(inner, &session, &requests, progress).await {
        Err(e) => Err(e),
        Ok(()) => {
            let new = NewImage {
                reference: reference.clone(),
                target: resolved.target,
                documents: resolved.documents,
                config: (manifest.config.digest, config.to_vec()),
                layers: diff_ids.clone(),
            };
            let store = inner.store.clone();
            blocking(move || store.commit(new)).await
        }
    };
    drop(lease);
    match &outcome {
        Ok(_) => progress.done(),
        Err(e) if !e.is_transient() => {
            abandoned.store(true, Ordering::SeqCst);
            // Before returning, so that the space is free when the client learns of the failure.
            inner.jobs.ended(&requests).await;
            discard(inner, diff_ids, requests).await;
            if e.kind() == ImageErrorKind::NoSpace {
                let inner = inner.clone();
                if let Err(e) = blocking(move || inner.jobs.reclaim(0)).await {
                    tracing::warn!(error = %e.report(), "failed to reclaim partial downloads");
                }
            }
        }
        Err(_) => {}
    }
    outcome
}

/// Follows the reference through indexes to the manifest for this machine.
async fn resolve(
    session: &Session,
    reference: &Reference,
    platform: Platform,
) -> ImageResult<Resolved> {
    let mut fetched = session
        .manifest(reference.target(), reference.digest())
        .await?;
    let target = fetched.digest.clone();
    let mut documents = Vec::new();
    for _ in 0..=MAX_INDEX_DEPTH {
        let what = format!("manifest {} of {}", fetched.digest, reference.name());
        let document = manifest::parse(
            &what,
            fetched.media_type.as_deref(),
            &fetched.bytes,
            platform,
        )?;
        documents.push((fetched.digest, fetched.bytes));
        match document {
            Document::Manifest(manifest) => {
                return Ok(Resolved {
                    target,
                    documents,
                    manifest,
                });
            }
            Document::Index(next) => {
                fetched = session
                    .manifest(next.digest.as_str(), Some(&next.digest))
                    .await?
            }
        }
    }
    let what = format!("the nesting of indexes of {}", reference.name());
    Err(ImageError::TooLarge {
        subject: what,
        limit: MAX_INDEX_DEPTH as u64,
        unit: "levels",
    })
}

/// Downloads all layers into the store; the first failure cancels the others.
async fn fetch_layers(
    inner: &Arc<Inner>,
    session: &Arc<Session>,
    requests: &[LayerRequest],
    progress: &Progress,
) -> ImageResult<()> {
    let layer = |(at, request)| {
        let report = move |state| progress.layer(at, state);
        inner.jobs.obtain(session, request, report).boxed()
    };
    let layers: Vec<BoxFuture<'_, ImageResult<()>>> =
        requests.iter().enumerate().map(layer).collect();
    stream::iter(layers)
        .buffer_unordered(inner.options.parallel_layers.max(1))
        .try_collect()
        .await
}

/// Deletes the data of a pull that failed permanently.
async fn discard(inner: &Arc<Inner>, layers: Vec<Digest>, requests: Vec<LayerRequest>) {
    let inner = inner.clone();
    let delete = move || {
        inner.jobs.discard(&requests)?;
        inner.store.discard(&layers)
    };
    if let Err(e) = blocking(delete).await {
        tracing::warn!(error = %e.report(), "failed to delete the data of a failed pull");
    }
}

/// Optional progress channel.
struct Progress(Option<ProgressSender>);

impl Progress {
    fn start(&self, reference: &Reference) {
        if let Some(sender) = &self.0 {
            sender.send_modify(|p| p.reference = reference.to_string());
        }
    }

    fn layers(&self, requests: &[LayerRequest]) {
        let layer = |r: &LayerRequest| LayerProgress {
            digest: r.blob.digest.to_string(),
            total_bytes: r.blob.size,
            received_bytes: 0,
            state: LayerState::Waiting,
        };
        if let Some(sender) = &self.0 {
            sender.send_modify(|p| p.layers = requests.iter().map(layer).collect());
        }
    }

    fn layer(&self, at: usize, state: LayerProgress) {
        if let Some(sender) = &self.0 {
            sender.send_modify(|p| {
                if let Some(layer) = p.layers.get_mut(at) {
                    *layer = state;
                }
            });
        }
    }

    fn done(&self) {
        if let Some(sender) = &self.0 {
            sender.send_modify(|p| p.done = true);
        }
    }
}
