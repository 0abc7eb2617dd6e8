//! [`LayerJobs`]: adds a layer to the store once, however many pulls need it at the same time.
//!
//! A job has two halves. `download` (async) reads the blob from the registry, resuming broken connections, and sends the
//! bytes through a bounded channel. `convert` (one blocking thread) appends them to the partial file, hashes and
//! decompresses them and writes the EROFS file, so that a layer is ready soon after its last byte.
//!
//! ```text
//! registry ──chunks──► channel ──► partial file, sha256 ──► gunzip ──► sha256 ──► tar ──► EROFS ──fsync, rename──► store
//! ```
//!
//! No job holds anything that others need while it waits for bytes: the conversion takes a [`Turn`] only while it has bytes to
//! process. A pull has a bounded number of jobs, so that an image with many layers does not delay the others.
//!
//! A job is a shared future: it runs while any of its callers polls it, and is dropped with the last of them. Then the
//! channel closes and the conversion is cancelled; the thread deletes its EROFS file and ends, and the partial file is kept.
//! The next job for the blob replays it into a new conversion and requests the rest from the registry.

mod convert;
mod download;
mod source;
mod turn;

use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, Shared, WeakShared};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::error::{ImageError, ImageErrorKind, ImageResult};
use super::manifest::Descriptor;
use super::reference::Digest;
use super::registry::Session;
use super::store::Store;
use super::types::{LayerProgress, LayerState, RegistryOptions};
use turn::Turn;

/// Maximum number of concurrent layer jobs, as many as 20 pulls have: each has a thread, a connection and some MiB of buffers.
/// A job that waits for a registry counts; the minimum rate ends jobs of slow registries.
const MAX_JOBS: usize = 64;
/// Maximum number of conversions that use the CPU at the same time.
const MAX_CONVERTING: usize = 8;

/// Request for a layer.
#[derive(Debug, Clone)]
pub(super) struct LayerRequest {
    pub blob: Descriptor,
    pub diff_id: Digest,
    /// Maximum size of the tar stream.
    pub max_bytes: u64,
    /// Set once the pull has failed permanently: its partial downloads are deleted.
    pub abandoned: Arc<AtomicBool>,
}

type Job = Shared<BoxFuture<'static, ImageResult<()>>>;

/// Lowest accepted rate of a download.
#[derive(Debug, Clone, Copy)]
struct Rate {
    /// In bytes per second; 0 accepts any rate.
    minimum: u64,
    /// Time over which the rate is measured.
    window: Duration,
}

/// The layer jobs of a store.
pub(super) struct LayerJobs {
    store: Arc<Store>,
    jobs: Mutex<HashMap<String, Running>>,
    permits: Arc<Semaphore>,
    turns: Arc<Semaphore>,
    rate: Rate,
    /// Tracks the conversion threads, which may outlive their job by one chunk.
    threads: TaskTracker,
}

struct Running {
    job: WeakShared<BoxFuture<'static, ImageResult<()>>>,
    progress: watch::Receiver<LayerProgress>,
    /// Conversion threads of this job: they hold its files open, and with them the disk space of deleted files.
    threads: TaskTracker,
}

impl Running {
    /// Returns the job, unless it has ended or has no callers.
    fn job(&self) -> Option<Job> {
        self.job.upgrade().filter(|job| job.peek().is_none())
    }
}

impl LayerJobs {
    pub(super) fn new(store: Arc<Store>, options: &RegistryOptions) -> Self {
        Self {
            store,
            jobs: Mutex::default(),
            permits: Arc::new(Semaphore::new(MAX_JOBS)),
            turns: Arc::new(Semaphore::new(MAX_CONVERTING)),
            rate: Rate {
                minimum: options.min_bytes_per_second,
                window: options.stall_timeout,
            },
            threads: TaskTracker::new(),
        }
    }

    /// Adds the layer to the store. `report` is called with its progress.
    ///
    /// Dropping the future of the last caller cancels the job; see the module's documentation.
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
                // A job of another pull may have failed because of that pull's credentials.
                Err(_) if joined => continue,
                outcome => return outcome.map_err(layer),
            }
        }
    }

    /// Deletes the partial downloads of layers whose pull has failed permanently. A conversion thread that is still
    /// running deletes its own, because the pull has set `abandoned`. Blocks.
    pub(super) fn discard(&self, requests: &[LayerRequest]) -> ImageResult<()> {
        let ingest = self.store.ingest_dir();
        requests
            .iter()
            .try_for_each(|r| super::store::delete(&ingest.join(partial_name(r))))
    }

    /// Waits until the threads of those of `requests` without callers have ended, which frees the space of their open
    /// files. Each thread ends within one chunk or block write.
    pub(super) async fn ended(&self, requests: &[LayerRequest]) {
        let ending: Vec<TaskTracker> = {
            let jobs = self.jobs.lock();
            requests
                .iter()
                .filter_map(|request| jobs.get(&partial_name(request)))
                .filter(|running| running.job().is_none())
                .map(|running| running.threads.clone())
                .collect()
        };
        for threads in ending {
            threads.close();
            threads.wait().await;
        }
    }

    /// Deletes partial downloads without a job; see [`Store::reclaim_partials`]. Blocks.
    pub(super) fn reclaim(&self, max_bytes: u64) -> ImageResult<()> {
        // Under the lock, so that no job starts to use a file that is being deleted.
        let jobs = self.jobs.lock();
        self.store.reclaim_partials(max_bytes, |name| {
            jobs.get(name)
                .is_some_and(|running| running.job().is_some() || !running.threads.is_empty())
        })
    }

    /// Waits until all conversion threads have ended.
    pub(super) async fn wait_idle(&self) {
        self.threads.close();
        self.threads.wait().await;
        self.threads.reopen();
    }

    /// Returns the running job for the layer (and true), or a new one (and false).
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
        let layer_job = LayerJob {
            store: self.store.clone(),
            session: session.clone(),
            request: request.clone(),
            partial: self.store.ingest_dir().join(&key),
            all_threads: self.threads.clone(),
            threads: threads.clone(),
            turns: self.turns.clone(),
            rate: self.rate,
            progress: sender,
        };
        let permits = self.permits.clone();
        let job = async move {
            // The semaphore is never closed.
            let _permit = permits
                .acquire_owned()
                .await
                .map_err(|_| ImageError::Cancelled)?;
            // A shared future that panics panics in all of its callers, so that one pull would end the others.
            let outcome = AssertUnwindSafe(layer_job.run()).catch_unwind().await;
            outcome.unwrap_or(Err(ImageError::Lost {
                subject: "the download of a layer",
            }))
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

/// Polls the job and forwards its progress.
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

/// A layer job.
struct LayerJob {
    store: Arc<Store>,
    session: Arc<Session>,
    request: LayerRequest,
    partial: PathBuf,
    all_threads: TaskTracker,
    threads: TaskTracker,
    turns: Arc<Semaphore>,
    rate: Rate,
    progress: watch::Sender<LayerProgress>,
}

impl LayerJob {
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
                    // One duration for both halves, because they run concurrently.
                    tracing::info!(
                        layer = %self.request.blob.digest,
                        milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
                        "layer downloaded and converted"
                    );
                    self.report(LayerState::Done, self.request.blob.size);
                    return Ok(());
                }
                // The partial file may be damaged: a power cut can leave zeros in it. Retry once from the start.
                Err(e) if first && resumed > 0 && is_content(&e) => {
                    tracing::info!(layer = %self.request.blob.digest, "partial download is damaged, restarting");
                    first = false;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Runs one conversion with as many connections as necessary. Also returns the number of resumed bytes.
    async fn attempt(&self) -> (ImageResult<()>, u64) {
        let (sender, receiver) = download::channel();
        let cancelled = CancellationToken::new();
        // Also ends a conversion that has all its bytes and does not notice the closed channel.
        let _cancel = cancelled.clone().drop_guard();
        let task = convert::Task {
            store: self.store.clone(),
            request: self.request.clone(),
            partial: self.partial.clone(),
            input: receiver,
            turn: Turn::new(self.turns.clone()),
            cancelled,
        };
        let (started, resumed) = tokio::sync::oneshot::channel();
        let running = self.threads.token();
        let thread = self.all_threads.spawn_blocking(move || {
            let outcome = task.run(started);
            drop(running);
            outcome
        });
        // After an error before the start, the thread's result below has the error.
        let resumed = resumed.await.unwrap_or(0);
        self.report(LayerState::Pulling, resumed);
        let fed = download::feed(
            &self.session,
            &self.request.blob,
            self.rate,
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
            subject: "the conversion of a layer",
        }));
        let outcome = match (fed, converted) {
            // Each half's failure cancels the other: report the original error.
            (Err(fed), Err(ImageError::Cancelled)) => Err(fed),
            (_, converted) => converted,
        };
        if outcome.as_ref().err().is_some_and(|e| !e.is_transient())
            && let Err(e) = super::store::delete(&self.partial)
        {
            tracing::warn!(error = %e.report(), "failed to delete a partial download");
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

/// Returns the partial file's name, which is the job's key. It has both digests: two images may claim different diff IDs
/// for a blob, and the wrong one must not affect the other.
fn partial_name(request: &LayerRequest) -> String {
    format!(
        "{}-{}{}",
        request.blob.digest.hex(),
        request.diff_id.hex(),
        super::store::PARTIAL_SUFFIX
    )
}
