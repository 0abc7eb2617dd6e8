//! [`Input`]: copies a FIFO (containerd's stdin) to a process in the guest. boxlite-cri attaches to the guest directly.
//!
//! CloseIO ends the input. A writer that disconnects (a client that detaches) does not: another one may attach, as under
//! runc's shim.

use crate::pod::{Context, Guest};
use boxlite_proto::boxlite::v1::SendInputRequest;
use boxlite_proto::names::MAX_CHUNK_BYTES;
use boxlite_sys::report::Report;
use std::io;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Capacity of the channel of chunks to the guest.
const CHUNK_CHANNEL_CAPACITY: usize = 4;
/// Name of this writer in the guest, which tracks offsets per writer.
const WRITER: &str = "shim";
/// Time for which the FIFO must remain empty after CloseIO before the input is closed.
const CLOSE_LINGER: Duration = Duration::from_millis(50);

/// Handle to the copying task; dropping it stops the task.
pub struct Input {
    close: CancellationToken,
    _end: DropGuard,
}

impl Input {
    /// Starts copying `fifo` to the input of a process; None if the process has no FIFO (an empty path) or it cannot be
    /// opened.
    pub fn spawn(
        context: &Context,
        guest: &Guest,
        container: &str,
        exec: &str,
        fifo: &str,
    ) -> Option<Self> {
        if fifo.is_empty() {
            return None;
        }
        let path = fifo.trim_start_matches("fifo://").to_owned();
        // Opened for writing too, so that the FIFO has no EOF when its last writer disconnects.
        let fifo = match pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(&path)
        {
            Ok(fifo) => fifo,
            Err(error) => {
                tracing::warn!(path, %error, "failed to open input FIFO");
                return None;
            }
        };
        let close = CancellationToken::new();
        let end = CancellationToken::new();
        let (sender, receiver) = mpsc::channel(CHUNK_CHANNEL_CAPACITY);
        let first = SendInputRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            writer: WRITER.to_owned(),
            ..Default::default()
        };
        let read = read(fifo, first, sender, close.clone());
        let execution = guest.session.execution();
        let (ended, over) = (guest.ended.clone(), end.clone());
        context.tasks.spawn(async move {
            let send = execution.send_input(tokio_stream::wrappers::ReceiverStream::new(receiver));
            let both = async { tokio::join!(read, send).1 };
            let result = tokio::select! {
                result = both => result,
                () = ended.cancelled() => return,
                () = over.cancelled() => return,
            };
            if let Err(error) = result {
                tracing::debug!(error = %Report(&error), "input stream ended with an error");
            }
        });
        Some(Self {
            close,
            _end: end.drop_guard(),
        })
    }

    /// Handles CloseIO: sends the bytes in the FIFO, then closes the input.
    pub fn close(&self) {
        self.close.cancel();
    }
}

async fn read(
    fifo: pipe::Receiver,
    mut message: SendInputRequest,
    to: mpsc::Sender<SendInputRequest>,
    close: CancellationToken,
) {
    let mut buffer = vec![0; MAX_CHUNK_BYTES];
    let mut offset = 0;
    if to.send(message.clone()).await.is_err() {
        return;
    }
    loop {
        let closing = close.is_cancelled();
        let ready = tokio::select! {
            biased;
            ready = fifo.readable() => ready.is_ok(),
            () = tokio::time::sleep(CLOSE_LINGER), if closing => false,
            () = close.cancelled(), if !closing => continue,
        };
        let count = match fifo.try_read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && ready => continue,
            Err(_) => 0,
        };
        message.offset = offset;
        message.data = bytes::Bytes::copy_from_slice(&buffer[..count]);
        message.eof = count == 0;
        offset += count as u64;
        if to.send(message.clone()).await.is_err() || count == 0 {
            return;
        }
    }
}
