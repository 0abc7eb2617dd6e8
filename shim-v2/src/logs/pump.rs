//! [`LogPump`]: carries one process's output from the guest to its [`Sink`], with two tasks and a bounded queue.
//!
//! The reader takes chunks as they come and never waits for a disk unless [`QUEUE_LIMIT`] bytes wait already; it comes
//! back at the same offset after a broken connection. The writer ([`super::pump::write`]) formats, writes whole batches,
//! and only then lets the acknowledger tell the guest. A disk that is full is tried again for as long as the pump lives.
//!
//! [`Drained`] tells when everything is where it belongs; [`LogPump::close`] gives up what is not.

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

/// Output read from the guest that waits for the disk, in bytes per process. More than a guest's own buffer holds
/// unacknowledged, so an honest guest's stream is never left unread.
const QUEUE_LIMIT: usize = 4 << 20;
/// Pause before a guest whose stream broke for good is asked again.
const READ_PAUSE: Duration = Duration::from_millis(100);
/// An acknowledgement is a call of its own: it waits until it frees this much, in bytes, a quarter of the guest's buffer…
const ACK_EVERY: u64 = 256 << 10;
/// … or for this long. A buffer full of tiny pieces holds less than [`ACK_EVERY`], and the process must not wait for more.
const ACK_DELAY: Duration = Duration::from_millis(20);
/// Pause before an acknowledgement that failed is sent again.
const ACK_PAUSE: Duration = Duration::from_millis(200);
/// After the end of the VM: how long its last bytes may take out of the socket they are in.
const AFTERMATH_LIMIT: Duration = Duration::from_millis(300);
/// How often [`Drained::within`] looks whether anything moved.
const PROGRESS_POLL: Duration = Duration::from_millis(250);

/// A chunk with its share of the queue.
struct Piece {
    chunk: OutputChunk,
    _room: OwnedSemaphorePermit,
}

/// What the writer can be asked.
pub(super) enum Command {
    Reopen(oneshot::Sender<Result<()>>),
}

/// Counts what moved.
#[derive(Debug, Default)]
pub(super) struct Progress(AtomicU64);

impl Progress {
    pub(super) fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64 + 1, Ordering::Relaxed);
    }

    fn seen(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The handle. Dropping it does not stop the pump; [`LogPump::close`] does.
pub struct LogPump {
    commands: mpsc::UnboundedSender<Command>,
    done: watch::Receiver<bool>,
    progress: Arc<Progress>,
    give_up: CancellationToken,
}

impl LogPump {
    /// Follows the output of a process from its first byte.
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

    /// As [`LogPump::spawn`] over any source; `ended` says that the VM is gone.
    pub fn run(
        tasks: &TaskTracker,
        source: impl Source,
        sink: Sink,
        ended: CancellationToken,
    ) -> Self {
        let (queue_in, queue) = mpsc::unbounded_channel();
        let (commands, orders) = mpsc::unbounded_channel();
        let (ack_in, acks) = watch::channel(0);
        let (done_in, done) = watch::channel(false);
        let progress = Arc::new(Progress::default());
        let give_up = CancellationToken::new();
        let acker = source.acker();
        let reader = Reader {
            source,
            queue: queue_in,
            room: Arc::new(Semaphore::new(QUEUE_LIMIT)),
            progress: progress.clone(),
            ended: ended.clone(),
            give_up: give_up.clone(),
        };
        let writer = Writer::new(sink, orders, ack_in, progress.clone(), give_up.clone());
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

    /// Closes the log file after what is queued was written and opens its path anew; answers on `reply`. Where the disk
    /// takes nothing, the record under way is taken back from the old file and goes to the new one, whole.
    pub fn reopen(&self, reply: oneshot::Sender<Result<()>>) {
        if let Err(mpsc::error::SendError(Command::Reopen(reply))) =
            self.commands.send(Command::Reopen(reply))
        {
            // All output was written and the file is closed: there is nothing to reopen, and nothing is lost by it.
            drop(reply.send(Ok(())));
        }
    }

    /// A watch on the end of the output.
    pub fn watch_drained(&self) -> Drained {
        Drained {
            done: self.done.clone(),
            progress: self.progress.clone(),
        }
    }

    /// Ends the pump: stops reading, gives up writing where that does not succeed at once, closes the sink.
    pub async fn close(mut self) {
        self.give_up.cancel();
        // An error means that the writer is gone: closed too.
        drop(self.done.wait_for(|done| *done).await);
    }
}

/// See [`LogPump::watch_drained`].
pub struct Drained {
    done: watch::Receiver<bool>,
    progress: Arc<Progress>,
}

impl Drained {
    /// Waits until everything was written. False: nothing moved for `limit`. Dropping the future changes nothing.
    pub async fn within(mut self, limit: Duration) -> bool {
        let mut seen = self.progress.seen();
        let mut still = Duration::ZERO;
        loop {
            tokio::select! {
                _ = self.done.wait_for(|done| *done) => return true,
                () = tokio::time::sleep(PROGRESS_POLL) => {}
            }
            let now = self.progress.seen();
            still = if now == seen {
                still + PROGRESS_POLL
            } else {
                Duration::ZERO
            };
            seen = now;
            if still >= limit {
                return false;
            }
        }
    }
}

struct Reader<S> {
    source: S,
    queue: mpsc::UnboundedSender<Piece>,
    room: Arc<Semaphore>,
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
                () = self.ended.cancelled() => return self.aftermath().await,
            };
            match next {
                Ok(Some(chunk)) => {
                    if !self.enqueue(chunk).await {
                        return;
                    }
                }
                Ok(None) => return,
                Err(error) if error.is_transport() => {
                    tracing::debug!(error = %Report(&error), "output stream broke; asking again");
                    tokio::select! {
                        () = tokio::time::sleep(READ_PAUSE) => {}
                        () = self.ended.cancelled() => return,
                    }
                }
                Err(error) => {
                    tracing::error!(error = %Report(&error), "output stream ends here");
                    return;
                }
            }
        }
    }

    async fn enqueue(&mut self, chunk: OutputChunk) -> bool {
        self.progress.add(chunk.data.len());
        let wanted = u32::try_from(chunk.data.len().clamp(1, QUEUE_LIMIT)).unwrap_or(1);
        let Ok(room) = self.room.clone().acquire_many_owned(wanted).await else {
            return false;
        };
        self.queue.send(Piece { chunk, _room: room }).is_ok()
    }

    /// The VM is gone: takes what its sockets still hold.
    async fn aftermath(&mut self) {
        while let Ok(Ok(Some(chunk))) =
            tokio::time::timeout(AFTERMATH_LIMIT, self.source.next()).await
        {
            if !self.enqueue(chunk).await {
                return;
            }
        }
    }
}

/// Tells the guest what reached the sink: always the newest offset, never two calls at once. Ends with the writer.
async fn acknowledge(
    acker: impl source::Acker,
    mut acks: watch::Receiver<u64>,
    ended: CancellationToken,
) {
    let mut acked = 0;
    while acks.changed().await.is_ok() {
        // Both ends are fine: enough came, or the delay is over. The writer's end is noticed by `changed`.
        let enough = acks.wait_for(|offset| offset.saturating_sub(acked) >= ACK_EVERY);
        drop(tokio::time::timeout(ACK_DELAY, enough).await);
        loop {
            let offset = *acks.borrow_and_update();
            let told = tokio::select! {
                told = acker.ack(offset) => told,
                () = ended.cancelled() => return,
            };
            match told {
                Ok(()) => {
                    acked = offset;
                    break;
                }
                Err(error) if error.is_transport() => tokio::time::sleep(ACK_PAUSE).await,
                // Gone already, which frees the output too.
                Err(error) => {
                    tracing::debug!(offset, error = %Report(&error), "not acknowledged");
                    break;
                }
            }
        }
    }
}

/// What a reopen is answered with where the output goes to no file.
fn refuse_reopen(command: Command) {
    let Command::Reopen(reply) = command;
    drop(reply.send(Err::<(), ShimError>(no_file())));
}

#[cfg(test)]
mod tests;
