//! [`Input`]: carries a FIFO's bytes into a process (containerd's stdin). boxlite-cri's attach goes to the guest itself.
//!
//! Ends with CloseIO; the guest then sees the end of input. A writer that goes (a client that detaches) ends nothing: the
//! next one may attach, as under runc's shim.

use crate::pod::{Context, Guest};
use boxlite_proto::boxlite::v1::SendInputRequest;
use boxlite_proto::names::CHUNK_LIMIT;
use boxlite_sys::report::Report;
use std::io;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Chunks under way to the guest.
const QUEUE: usize = 4;
/// Name under which this writer's offsets are counted in the guest.
const WRITER: &str = "shim";
/// After CloseIO: how long the FIFO must stay empty before its end is taken for real.
const CLOSE_LINGER: Duration = Duration::from_millis(50);

/// The handle; dropping it ends the carrying.
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
        // For writing too: so the FIFO has no end when its last writer goes.
        let fifo = match pipe::OpenOptions::new()
            .read_write(true)
            .open_receiver(&path)
        {
            Ok(fifo) => fifo,
            Err(error) => {
                tracing::warn!(path, %error, "input FIFO cannot be opened");
                return None;
            }
        };
        let close = CancellationToken::new();
        let end = CancellationToken::new();
        let (sender, receiver) = mpsc::channel(QUEUE);
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
                tracing::debug!(error = %Report(&error), "input ends");
            }
        });
        Some(Self {
            close,
            _end: end.drop_guard(),
        })
    }

    /// CloseIO: what is in the FIFO still goes, then the end.
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
    let mut buffer = vec![0; CHUNK_LIMIT];
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
