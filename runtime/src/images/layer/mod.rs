//! [`LayerJobs`]: gets a layer into the store, once, however many pulls want it at the same time.
//!
//! A job has two sides. `download` (async) reads the blob from the registry, again from where it was after a cut, and
//! sends the bytes through a bounded channel. `convert` (one blocking thread) appends them to the partial file, hashes
//! them, unpacks the compression and writes the EROFS file, so that layers are ready when their last byte is.
//!
//! ```text
//! registry ──chunks──► channel ──► partial file, sha256 ──► gunzip ──► sha256 ──► tar ──► EROFS ──fsync, rename──► store
//! ```
//!
//! A job is a shared future: it runs while any of its callers polls it, and is dropped with the last of them. Then the
//! channel closes, the thread deletes its EROFS file and ends, and the partial file stays; the next job for the blob
//! replays it into a new conversion and asks the registry for the rest.

mod convert;
mod download;
mod source;

use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use tokio::sync::{Semaphore, watch};
use tokio_util::task::TaskTracker;

use super::error::{ImageError, ImageErrorKind, ImageResult};
use super::manifest::Descriptor;
use super::reference::Digest;
use super::registry::Session;
use super::store::Store;
use super::types::{LayerProgress, LayerState};

/// Layers under way in the whole store: each has a thread, a connection and some MiB of buffers.
const MAX_JOBS: usize = 8;

/// One layer to get.
#[derive(Debug, Clone)]
pub(super) struct LayerRequest {
    pub blob: Descriptor,
    pub diff_id: Digest,
    /// Largest tar stream in bytes.
    pub max_bytes: u64,
    /// Set once the pull has failed for good: what has come is then not worth keeping.
    pub abandoned: Arc<AtomicBool>,
}

type Job = Shared<BoxFuture<'static, ImageResult<()>>>;

/// See the module's header.
pub(super) struct LayerJobs {
    store: Arc<Store>,
    jobs: Mutex<HashMap<String, Running>>,
    permits: Arc<Semaphore>,
    /// Owns the conversion threads, which may outlive their job by one chunk.
    threads: TaskTracker,
}

struct Running {
    job: WeakShared<BoxFuture<'static, ImageResult<()>>>,
    progress: watch::Receiver<LayerProgress>,
    /// The job's own conversion threads: they hold its files open, and so the disk space of deleted ones.
    threads: TaskTracker,
}

impl Running {
    /// The job, unless it has ended or its last caller has gone.
    fn job(&self) -> Option<Job> {
        self.job.upgrade().filter(|job| job.peek().is_none())
    }
}

impl LayerJobs {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            jobs: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_JOBS)),
            threads: TaskTracker::new(),
        }
    }

    /// Brings the layer into the store. `report` is called with its progress.
    ///
    /// Dropping the future gives up this caller's interest only; see the module's header for the last one's.
    pub(super) async fn obtain(
        &self,
        session: &Arc<Session>,
        request: &LayerRequest,
        report: impl Fn(LayerProgress) + Send + Sync,
    ) -> ImageResult<()> {
        let layer = |source| ImageError::Layer {
            digest: request.blob.digest.to_string(),
            source: Box::new(source),
        };
        loop {
            if self.store.layer(&request.diff_id)?.is_some() {
                report(progress(request, LayerState::Present, request.blob.size));
                return Ok(());
            }
            let (job, mut watch, joined) = self.job(session, request);
            let outcome = follow(job, &mut watch, &report).await;
            match outcome {
                // Somebody else's job may have failed for its own reasons, such as its credentials.
                Err(_) if joined => continue,
                outcome => return outcome.map_err(layer),
            }
        }
    }

    /// Deletes the partial downloads of layers whose pull has failed for good. A conversion thread that hasn't noticed
    /// yet deletes its own, since the pull has set `abandoned`. Blocks.
    pub(super) fn discard(&self, requests: &[LayerRequest]) -> ImageResult<()> {
        let ingest = self.store.ingest_dir();
        requests
            .iter()
            .try_for_each(|r| super::store::delete(&ingest.join(partial_name(r))))
    }

    /// Waits until the threads of those of `requests` that nobody wants any more have ended, each within one chunk or
    /// block write: then what they had open is freed.
    pub(super) async fn ended(&self, requests: &[LayerRequest]) {
        let left: Vec<TaskTracker> = {
            let jobs = self.jobs.lock();
            requests
                .iter()
                .filter_map(|request| jobs.get(&partial_name(request)))
                .filter(|running| running.job().is_none())
                .map(|running| running.threads.clone())
                .collect()
        };
        for threads in left {
            threads.close();
            threads.wait().await;
        }
    }

    /// Waits until no conversion thread is left.
    pub(super) async fn settle(&self) {
        self.threads.close();
        self.threads.wait().await;
        self.threads.reopen();
    }

    /// The job for the layer that runs already (then true), or a new one.
    fn job(
        &self,
        session: &Arc<Session>,
        request: &LayerRequest,
    ) -> (Job, watch::Receiver<LayerProgress>, bool) {
        let key = partial_name(request);
        let mut jobs = self.jobs.lock();
        jobs.retain(|_, running| running.job().is_some() || !running.threads.is_empty());
        if let Some(running) = jobs.get(&key)
            && let Some(job) = running.job()
        {
            return (job, running.progress.clone(), true);
        }
        let threads = TaskTracker::new();
        let (sender, receiver) = watch::channel(progress(request, LayerState::Waiting, 0));
        let work = Work {
            store: self.store.clone(),
            session: session.clone(),
            request: request.clone(),
            partial: self.store.ingest_dir().join(&key),
            all_threads: self.threads.clone(),
            threads: threads.clone(),
            progress: sender,
        };
        let permits = self.permits.clone();
        let job = async move {
            // The semaphore is never closed.
            let _permit = permits
                .acquire_owned()
                .await
                .map_err(|_| ImageError::Cancelled)?;
            work.run().await
        }
        .boxed()
        .shared();
        if let Some(weak) = job.downgrade() {
            jobs.insert(
                key,
                Running {
                    job: weak,
                    progress: receiver.clone(),
                    threads,
                },
            );
        }
        (job, receiver, false)
    }
}

/// Polls the job and passes its progress on.
async fn follow(
    job: Job,
    watch: &mut watch::Receiver<LayerProgress>,
    report: &(impl Fn(LayerProgress) + Sync),
) -> ImageResult<()> {
    tokio::pin!(job);
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            outcome = &mut job => {
                report(watch.borrow().clone());
                return outcome;
            }
            changed = watch.changed(), if open => match changed {
                Ok(()) => report(watch.borrow_and_update().clone()),
                Err(_) => open = false,
            },
        }
    }
}

/// Everything one job needs.
struct Work {
    store: Arc<Store>,
    session: Arc<Session>,
    request: LayerRequest,
    partial: PathBuf,
    all_threads: TaskTracker,
    threads: TaskTracker,
    progress: watch::Sender<LayerProgress>,
}

impl Work {
    async fn run(self) -> ImageResult<()> {
        if self.store.layer(&self.request.diff_id)?.is_some() {
            self.report(LayerState::Present, self.request.blob.size);
            return Ok(());
        }
        let mut first = true;
        let began = std::time::Instant::now();
        loop {
            let (outcome, resumed) = self.attempt().await;
            match outcome {
                Ok(()) => {
                    // One figure: the conversion runs while the bytes come.
                    tracing::info!(
                        layer = %self.request.blob.digest,
                        milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
                        "layer fetched and made an EROFS file"
                    );
                    self.report(LayerState::Done, self.request.blob.size);
                    return Ok(());
                }
                // What lay on disk may be at fault: a power cut can leave zeros in it. Once more, from the start.
                Err(e) if first && resumed > 0 && is_content(&e) => {
                    tracing::info!(layer = %self.request.blob.digest, "partial download is damaged, starting over");
                    first = false;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// One conversion fed by as many connections as it takes. Also gives the bytes that were there before.
    async fn attempt(&self) -> (ImageResult<()>, u64) {
        let (sender, receiver) = download::channel();
        let task = convert::Task {
            store: self.store.clone(),
            request: self.request.clone(),
            partial: self.partial.clone(),
            input: receiver,
        };
        let (started, resumed) = tokio::sync::oneshot::channel();
        let running = self.threads.token();
        let thread = self.all_threads.spawn_blocking(move || {
            let outcome = task.run(started);
            drop(running);
            outcome
        });
        // An error before the start answers nothing here and everything below.
        let resumed = resumed.await.unwrap_or(0);
        self.report(LayerState::Pulling, resumed);
        let fed = download::feed(
            &self.session,
            &self.request.blob,
            resumed,
            sender,
            |received| {
                self.report(LayerState::Pulling, received);
            },
        )
        .await;
        if fed.is_ok() {
            self.report(LayerState::Finishing, self.request.blob.size);
        }
        let converted = thread.await.unwrap_or(Err(ImageError::Lost {
            what: "the conversion of a layer",
        }));
        let outcome = match (fed, converted) {
            // The thread's own failure closed the channel, or the download's did: the one that isn't the echo counts.
            (Err(fed), Err(ImageError::Cancelled)) => Err(fed),
            (_, converted) => converted,
        };
        if outcome.as_ref().err().is_some_and(|e| !e.is_transient())
            && let Err(e) = super::store::delete(&self.partial)
        {
            tracing::warn!(error = %e.report(), "a partial download could not be deleted");
        }
        (outcome, resumed)
    }

    fn report(&self, state: LayerState, received: u64) {
        self.progress
            .send_replace(progress(&self.request, state, received));
    }
}

fn is_content(error: &ImageError) -> bool {
    matches!(
        error.kind(),
        ImageErrorKind::Corrupt | ImageErrorKind::InvalidImage | ImageErrorKind::TooLarge
    )
}

fn progress(request: &LayerRequest, state: LayerState, received_bytes: u64) -> LayerProgress {
    LayerProgress {
        digest: request.blob.digest.to_string(),
        total_bytes: request.blob.size,
        received_bytes,
        state,
    }
}

/// The partial file's name, also the job's key. Both digests: two images may disagree about what is in a blob, and the
/// wrong one must not disturb the other.
fn partial_name(request: &LayerRequest) -> String {
    format!(
        "{}-{}{}",
        request.blob.digest.hex(),
        request.diff_id.hex(),
        super::store::PARTIAL
    )
}
