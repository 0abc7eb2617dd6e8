//! [`Pump`]: carries FUSE messages of one mount between the host's kernel and the guest. It reads the opcode of requests, to
//! count the names that the kernel caches, and checks that replies are well-formed.
//!
//! A thread reads the device, because the kernel may block that read; a task writes the replies, which never blocks. A guest
//! that replies wrongly, late or never affects only readers of its mount.

use super::host_mounter::{HostMount, drop_unused_inodes};
use crate::fuse::next_request;
use boxlite_portal::{GuestSession, PortalError};
use boxlite_proto::boxlite::v1::FuseRequest;
use boxlite_proto::names::MAX_CHUNK_BYTES;
use boxlite_sys::fuse::{Frames, MAX_MESSAGE_BYTES};
use bytes::Bytes;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

/// Number of lookups after which the kernel drops unused inodes: each costs the agent a descriptor, and the kernel keeps them
/// until its own memory is short.
const NAMES_PER_DROP: usize = 1024;
/// Opcodes that return names, each with the approximate maximum number of names.
const LOOKUP: (u32, usize) = (1, 1);
const READDIRPLUS: (u32, usize) = (44, 256);
/// Number of chunks buffered for the guest.
const CHANNEL_CAPACITY: usize = 4;
/// Byte range of the request's unique id in a reply; id 0 marks an unsolicited notification.
const UNIQUE: std::ops::Range<usize> = 8..16;

/// Error that ended the reply stream.
#[derive(Debug, thiserror::Error)]
enum PumpError {
    /// The guest's stream failed.
    #[error(transparent)]
    Guest(#[from] PortalError),
    /// The guest sent an invalid FUSE message.
    #[error("invalid reply of the guest")]
    Frame(#[from] boxlite_sys::fuse::FrameError),
}

/// The thread and the task that serve one mount.
#[derive(Debug)]
pub(crate) struct Pump {
    task: AbortOnDropHandle<()>,
    /// Closing it stops the thread.
    stop: PipeWriter,
}

impl Pump {
    /// Starts both; they hold the device until [`Pump::stop`]. `died` receives the id if the guest's stream ends earlier.
    ///
    /// # Errors
    /// Failed to start the thread or to create the pipe.
    pub(crate) fn start(
        session: &GuestSession,
        id: u64,
        mounted: &HostMount,
        died: mpsc::Sender<u64>,
    ) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let (requests, outgoing) = mpsc::channel(CHANNEL_CAPACITY);
        let first = FuseRequest {
            id,
            ..Default::default()
        };
        // The queue is empty, so this succeeds.
        drop(requests.try_send(first));
        let device = Arc::clone(&mounted.device);
        let reading = Arc::clone(&device);
        let names = Names::new(Arc::clone(&mounted.mount));
        // Not joined: the kernel may block its read until the mount is gone.
        std::thread::Builder::new()
            .name(format!("fuse {id}"))
            .spawn(move || read(&reading, &stopped, &requests, names))?;
        // A dedicated connection: a slow reader must not stall other streams.
        let session = session.dedicated();
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(error) = answer(&session, &device, outgoing).await {
                tracing::warn!(id, error = %boxlite_sys::report::Report(&error), "connection of exported mount broke");
            }
            // If the channel is full, the next list finds this mount dead.
            let _ = died.try_send(id);
        }));
        Ok(Self { task, stop })
    }

    /// Stops both. The device is closed afterwards, except for the caller's own handle.
    pub(crate) async fn stop(self) {
        drop(self.stop);
        self.task.abort();
        // Returns the cancellation.
        let _ = self.task.await;
    }
}

/// Forwards requests from the device to the queue until either is closed. Blocks.
fn read(
    device: &OwnedFd,
    stopped: &PipeReader,
    requests: &mpsc::Sender<FuseRequest>,
    mut names: Names,
) {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    while let Some(length) = next_request(device, stopped, &mut buffer) {
        names.count(&buffer[..length]);
        for chunk in buffer[..length].chunks(MAX_CHUNK_BYTES) {
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

/// Counts names and makes the kernel drop unused ones.
struct Names {
    count: usize,
    mount: Arc<OwnedFd>,
    /// True while a drop is running.
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
        let opcode = request.get(4..).and_then(|rest| rest.first_chunk::<4>());
        let opcode = opcode.map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        for (lookup, names) in [LOOKUP, READDIRPLUS] {
            self.count += if opcode == lookup { names } else { 0 };
        }
        if self.count < NAMES_PER_DROP || self.busy.swap(true, Ordering::AcqRel) {
            return;
        }
        self.count = 0;
        let (mount, busy) = (Arc::clone(&self.mount), Arc::clone(&self.busy));
        // On a separate thread: dropping inodes sends requests that the calling thread must read. Not joined for the same
        // reason; it ends when the kernel has dropped them or the mount is gone.
        let spawned = std::thread::Builder::new().spawn(move || {
            if let Err(error) = drop_unused_inodes(&mount) {
                tracing::debug!(%error, "failed to drop unused inodes of exported mount");
            }
            busy.store(false, Ordering::Release);
        });
        if spawned.is_err() {
            self.busy.store(false, Ordering::Release);
        }
    }
}

/// Forwards replies from the guest to the device.
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
            // Notifications would change the kernel's caches; the guest may not send them.
            if message[UNIQUE].iter().all(|byte| *byte == 0) {
                continue;
            }
            // ENOENT: the request was interrupted. EINVAL: the reply is invalid and its requester never gets it.
            if let Err(error) = rustix::io::write(device, &message) {
                tracing::debug!(%error, "failed to write reply of the guest");
            }
        }
    }
    Ok(())
}
