//! [`Pump`]: carries FUSE messages of one mount between the host's kernel and the guest. Of a question it reads what kind
//! it is, to count the names that the kernel knows, and of an answer whether it is one.
//!
//! A thread reads the device, because that read is the kernel's to end; a task writes the answers, which never waits. The
//! guest may answer wrongly, late or never: that is between it and who reads the mount.

use super::place::{Mounted, forget};
use crate::fuse::next_request;
use boxlite_portal::{GuestSession, PortalError};
use boxlite_proto::boxlite::v1::FuseRequest;
use boxlite_proto::names::CHUNK_LIMIT;
use boxlite_sys::fuse::{Frames, MESSAGE_LIMIT};
use bytes::Bytes;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

/// Names that the kernel asks for before it is told to forget those that nobody uses: each costs the agent a descriptor, and
/// the kernel by itself keeps them until its own memory is short.
const NAMES: usize = 1024;
/// Kinds of questions that bring names, and how many at most or thereabouts.
const LOOKUP: (u32, usize) = (1, 1);
const READDIRPLUS: (u32, usize) = (44, 256);
/// Chunks that wait for the guest.
const QUEUE: usize = 4;
/// Where the number of a request is in its answer; a message of number 0 is none of the kernel's questions.
const NUMBER: std::ops::Range<usize> = 8..16;

/// Why the answers ended.
#[derive(Debug, thiserror::Error)]
enum PumpError {
    /// The guest's stream.
    #[error(transparent)]
    Guest(#[from] PortalError),
    /// What came is no FUSE message.
    #[error("the guest's answer")]
    Frame(#[from] boxlite_sys::fuse::FrameError),
}

/// See the module.
#[derive(Debug)]
pub struct Pump {
    task: JoinHandle<()>,
    /// Its close stops the thread.
    stop: PipeWriter,
}

impl Pump {
    /// Starts both; they hold the device until [`Pump::end`]. `died` is told the id when the guest's stream ends before that.
    ///
    /// # Errors
    /// No thread, or no pipe.
    pub fn begin(
        session: &GuestSession,
        id: u64,
        mounted: &Mounted,
        died: mpsc::Sender<u64>,
    ) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let (requests, outgoing) = mpsc::channel(QUEUE);
        let first = FuseRequest {
            id,
            ..Default::default()
        };
        // The queue is empty: there is room.
        drop(requests.try_send(first));
        let device = Arc::clone(&mounted.device);
        let reading = Arc::clone(&device);
        let names = Names::new(Arc::clone(&mounted.mount));
        std::thread::Builder::new()
            .name(format!("fuse {id}"))
            .spawn(move || read(&reading, &stopped, &requests, names))?;
        // A connection of its own: who reads slowly must stall nobody else.
        let session = session.dedicated();
        let task = tokio::spawn(async move {
            if let Err(error) = answer(&session, &device, outgoing).await {
                tracing::warn!(id, error = %boxlite_sys::report::Report(&error), "a mount of the guest is dead");
            }
            // Full: as many are dead already, and this one comes to light with the next list.
            let _ = died.try_send(id);
        });
        Ok(Self { task, stop })
    }

    /// Stops both. The device is closed when this is done, but for the caller's own handle.
    pub async fn end(self) {
        drop(self.stop);
        self.task.abort();
        // Cancelled is what it should be.
        let _ = self.task.await;
    }
}

/// From the device to the queue, until either is closed. Blocks.
fn read(
    device: &OwnedFd,
    stopped: &PipeReader,
    requests: &mpsc::Sender<FuseRequest>,
    mut names: Names,
) {
    let mut buffer = vec![0; MESSAGE_LIMIT];
    while let Some(length) = next_request(device, stopped, &mut buffer) {
        names.count(&buffer[..length]);
        for chunk in buffer[..length].chunks(CHUNK_LIMIT) {
            let request = FuseRequest {
                id: 0,
                data: Bytes::copy_from_slice(chunk),
            };
            if requests.blocking_send(request).is_err() {
                return;
            }
        }
    }
}

/// Counts names, and lets the kernel forget them.
struct Names {
    count: usize,
    mount: Arc<OwnedFd>,
    /// It is being told.
    busy: Arc<AtomicBool>,
}

impl Names {
    fn new(mount: Arc<OwnedFd>) -> Self {
        Self {
            count: 0,
            mount,
            busy: Arc::default(),
        }
    }

    fn count(&mut self, request: &[u8]) {
        let kind = request.get(4..).and_then(|rest| rest.first_chunk::<4>());
        let kind = kind.map_or(0, |kind| u32::from_ne_bytes(*kind));
        for (asks, names) in [LOOKUP, READDIRPLUS] {
            self.count += if kind == asks { names } else { 0 };
        }
        if self.count < NAMES || self.busy.swap(true, Ordering::AcqRel) {
            return;
        }
        self.count = 0;
        let (mount, busy) = (Arc::clone(&self.mount), Arc::clone(&self.busy));
        // A thread of its own: the kernel's forgetting asks questions that the caller must read.
        let begun = std::thread::Builder::new().spawn(move || {
            if let Err(error) = forget(&mount) {
                tracing::debug!(%error, "names of a mount are not forgotten");
            }
            busy.store(false, Ordering::Release);
        });
        if begun.is_err() {
            self.busy.store(false, Ordering::Release);
        }
    }
}

/// From the guest to the device.
async fn answer(
    session: &GuestSession,
    device: &OwnedFd,
    outgoing: mpsc::Receiver<FuseRequest>,
) -> Result<(), PumpError> {
    let mounts = session.mounts();
    let mut answers = mounts.fuse(ReceiverStream::new(outgoing)).await?;
    let mut frames = Frames::default();
    let broken = |status| PortalError::from_status("Mounts.Fuse", status);
    while let Some(answer) = answers.message().await.map_err(broken)? {
        frames.push(&answer.data);
        while let Some(message) = frames.cut()? {
            // News for the kernel's caches would be the guest's to send; it has no say there.
            if message[NUMBER].iter().all(|byte| *byte == 0) {
                continue;
            }
            // ENOENT: nobody waits for it any more. EINVAL: the guest's nonsense, which its asker never gets.
            if let Err(error) = rustix::io::write(device, &message) {
                tracing::debug!(%error, "an answer of the guest");
            }
        }
    }
    Ok(())
}
