//! [`LogPump`]: copies a process's output from the guest to its [`Sink`], with two tasks and a bounded queue.
//!
//! The reader waits for the disk only if [`MAX_QUEUED_BYTES`] are queued, and resumes at the same offset after a broken
//! connection. The writer ([`super::pump::write`]) formats and writes whole batches, and the acknowledger then reports them
//! to the guest. Writes to a full disk are retried as long as the pump exists.
//!
//! [`Drained`] completes when all output is written; [`LogPump::close`] discards the rest.

mod source;
mod write;

pub use source::{GuestSource, Source};

use super::sink::{Sink, no_file};
use crate::error::{Result, ShimError};
use crate::pod::{Context, Guest};
use boxlite_portal::OutputChunk;
use boxlite_sys::report::Report;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use write::Writer;

/// Maximum queued output per process. More than a guest buffers unacknowledged, so the stream of an honest guest is always
/// read.
const MAX_QUEUED_BYTES: usize = 4 << 20;
/// Delay before a broken output stream is reopened.
const READ_RETRY_DELAY: Duration = Duration::from_millis(100);
/// Output per acknowledgement, which is a separate call: a quarter of the guest's buffer.
const ACK_BYTES: u64 = 256 << 10;
/// Maximum delay of an acknowledgement. A guest buffer full of tiny chunks holds less than [`ACK_BYTES`].
const ACK_DELAY: Duration = Duration::from_millis(20);
/// Delay before a failed acknowledgement is retried.
const ACK_RETRY_DELAY: Duration = Duration::from_millis(200);
/// Timeout for reading the last bytes from the socket after the end of the VM.
const LAST_READ_TIMEOUT: Duration = Duration::from_millis(300);
/// Interval at which [`Drained::within`] checks for progress.
const PROGRESS_POLL_INTERVAL: Duration = Duration::from_millis(250);

/// A chunk with its permit of the queue.
struct QueuedChunk {
    chunk: OutputChunk,
    _permit: OwnedSemaphorePermit,
}

/// Commands to the writer.
pub(super) enum Command {
    Reopen(oneshot::Sender<Result<()>>),
}

/// Counter of copied bytes.
#[derive(Debug, Default)]
pub(super) struct Progress(AtomicU64);

impl Progress {
    pub(super) fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64 + 1, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Handle to a pump. [`LogPump::close`] stops the pump; dropping the handle does not.
pub struct LogPump {
    commands: mpsc::UnboundedSender<Command>,
    done: watch::Receiver<bool>,
    progress: Arc<Progress>,
    give_up: CancellationToken,
}

impl LogPump {
    /// Spawns a pump for the output of a process from its first byte.
    pub fn spawn(
        context: &Context,
        guest: &Guest,
        container: &str,
        exec: &str,
        sink: Sink,
    ) -> Self {
        let source = GuestSource::new(guest, container, exec);
        Self::run(&context.tasks, source, sink, guest.ended.clone())
    }

    /// Spawns a pump for any source; `ended` is cancelled at the end of the VM.
    pub fn run(
        tasks: &TaskTracker,
        source: impl Source,
        sink: Sink,
        ended: CancellationToken,
    ) -> Self {
        let (queue_in, queue) = mpsc::unbounded_channel();
        let (commands, command_receiver) = mpsc::unbounded_channel();
        let (ack_in, acks) = watch::channel(0);
        let (done_in, done) = watch::channel(false);
        let progress = Arc::new(Progress::default());
        let give_up = CancellationToken::new();
        let acker = source.acker();
        let reader = Reader {
            source,
            queue: queue_in,
            permits: Arc::new(Semaphore::new(MAX_QUEUED_BYTES)),
            progress: progress.clone(),
            ended: ended.clone(),
            give_up: give_up.clone(),
        };
        let writer = Writer::new(
            sink,
            command_receiver,
            ack_in,
            progress.clone(),
            give_up.clone(),
        );
        tasks.spawn(reader.run());
        tasks.spawn(acknowledge(acker, acks, ended));
        tasks.spawn(async move {
            let program = writer.run(queue).await;
            done_in.send_replace(true);
            if let Some(program) = program {
                program.finish().await;
            }
        });
        Self {
            commands,
            done,
            progress,
            give_up,
        }
    }

    /// Writes the queued output, closes the log file and opens its path again; then replies on `reply`. If the disk is full,
    /// a partially written record is removed from the old file and written to the new one.
    pub fn reopen(&self, reply: oneshot::Sender<Result<()>>) {
        if let Err(mpsc::error::SendError(Command::Reopen(reply))) =
            self.commands.send(Command::Reopen(reply))
        {
            // All output was written and the file is closed.
            drop(reply.send(Ok(())));
        }
    }

    /// Returns a watch on the end of the output.
    pub fn watch_drained(&self) -> Drained {
        Drained {
            done: self.done.clone(),
            progress: self.progress.clone(),
        }
    }

    /// Stops the pump: stops reading, abandons writes that do not succeed at once, closes the sink.
    pub async fn close(mut self) {
        self.give_up.cancel();
        // An error means that the writer has ended already.
        drop(self.done.wait_for(|done| *done).await);
    }
}

/// Watch on the end of a pump's output.
pub struct Drained {
    done: watch::Receiver<bool>,
    progress: Arc<Progress>,
}

impl Drained {
    /// Waits until all output is written. Returns false after `timeout` without progress. Cancel safe.
    pub async fn within(mut self, timeout: Duration) -> bool {
        let mut last = self.progress.count();
        let mut idle = Duration::ZERO;
        loop {
            tokio::select! {
                _ = self.done.wait_for(|done| *done) => return true,
                () = tokio::time::sleep(PROGRESS_POLL_INTERVAL) => {}
            }
            let now = self.progress.count();
            idle = if now == last {
                idle + PROGRESS_POLL_INTERVAL
            } else {
                Duration::ZERO
            };
            last = now;
            if idle >= timeout {
                return false;
            }
        }
    }
}

struct Reader<S> {
    source: S,
    queue: mpsc::UnboundedSender<QueuedChunk>,
    permits: Arc<Semaphore>,
    progress: Arc<Progress>,
    ended: CancellationToken,
    give_up: CancellationToken,
}

impl<S: Source> Reader<S> {
    async fn run(mut self) {
        let give_up = self.give_up.clone();
        tokio::select! {
            () = self.read() => {}
            () = give_up.cancelled() => {}
        }
    }

    async fn read(&mut self) {
        loop {
            let next = tokio::select! {
                biased;
                next = self.source.next() => next,
                () = self.ended.cancelled() => return self.read_rest().await,
            };
            match next {
                Ok(Some(chunk)) => {
                    if !self.enqueue(chunk).await {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) if error.is_transport() => {
                    tracing::debug!(error = %Report(&error), "output stream broke; reconnecting");
                    tokio::select! {
                        () = tokio::time::sleep(READ_RETRY_DELAY) => {}
                        () = self.ended.cancelled() => return,
                    }
                }
                Err(error) => {
                    tracing::error!(error = %Report(&error), "failed to read output; output is incomplete");
                    return;
                }
            }
        }
    }

    async fn enqueue(&mut self, chunk: OutputChunk) -> bool {
        self.progress.add(chunk.data.len());
        let size = u32::try_from(chunk.data.len().clamp(1, MAX_QUEUED_BYTES)).unwrap_or(1);
        let Ok(permit) = self.permits.clone().acquire_many_owned(size).await else {
            return false;
        };
        self.queue
            .send(QueuedChunk {
                chunk,
                _permit: permit,
            })
            .is_ok()
    }

    /// Reads the remaining bytes from the socket after the end of the VM.
    async fn read_rest(&mut self) {
        while let Ok(Ok(Some(chunk))) =
            tokio::time::timeout(LAST_READ_TIMEOUT, self.source.next()).await
        {
            if !self.enqueue(chunk).await {
                return;
            }
        }
    }
}

/// Acknowledges written output to the guest, always the newest offset and one call at a time. Ends with the writer.
async fn acknowledge(
    acker: impl source::Acker,
    mut acks: watch::Receiver<u64>,
    ended: CancellationToken,
) {
    let mut acked = 0;
    while acks.changed().await.is_ok() {
        // Completes when enough output is written or after the delay. `changed` reports the writer's end.
        let threshold = acks.wait_for(|offset| offset.saturating_sub(acked) >= ACK_BYTES);
        drop(tokio::time::timeout(ACK_DELAY, threshold).await);
        loop {
            let offset = *acks.borrow_and_update();
            let result = tokio::select! {
                result = acker.ack(offset) => result,
                () = ended.cancelled() => return,
            };
            match result {
                Ok(()) => {
                    acked = offset;
                    break;
                }
                Err(error) if error.is_transport() => tokio::time::sleep(ACK_RETRY_DELAY).await,
                // The process does not exist any more, so its output is freed.
                Err(error) => {
                    tracing::debug!(offset, error = %Report(&error), "failed to acknowledge output");
                    break;
                }
            }
        }
    }
}

/// Rejects a reopen of output that is not written to a file.
fn refuse_reopen(command: Command) {
    let Command::Reopen(reply) = command;
    drop(reply.send(Err::<(), ShimError>(no_file())));
}

#[cfg(test)]
mod tests;
