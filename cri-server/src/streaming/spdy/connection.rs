//! Server side of one SPDY/3.1 connection with multiple streams opened by the peer.
//!
//! [`serve`] drives it in the caller's task: reader, writer and the caller's handler run concurrently. It queues at
//! most [`INPUT_QUEUE_CHUNKS`] chunks per stream and [`OUTPUT_QUEUE_FRAMES`] frames for the peer: a stream whose
//! consumer stalls stalls its connection (Kubernetes peers of SPDY have TCP's flow control only), and no other. The
//! handler defines the meaning of the streams.
//!
//! ```text
//!  socket ─▶ frame::Reader ─▶ run ─▶ Input of a stream ─▶ handler ─▶ Output ─▶ queue ─▶ write_all ─▶ socket
//!                              └─ new Stream ─▶ accept queue ─┘
//! ```

use super::SpdyError;
use super::frame::{self, Frame, Reader, Reset};
use super::headers::{Deflater, Headers};
use crate::streaming::input::{Gone, Input};
use boxlite_sys::sync::Mutex;
use bytes::Bytes;
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Maximum number of queued chunks of at most 16 KiB per stream.
const INPUT_QUEUE_CHUNKS: usize = 4;
/// Maximum number of queued frames to the peer.
const OUTPUT_QUEUE_FRAMES: usize = 8;
/// Maximum number of concurrent streams; a forwarded TCP connection takes two.
pub(crate) const MAX_STREAMS: usize = 512;
/// Id of the server's pings, an even number; the answer is ignored.
const SERVER_PING_ID: u32 = 2;
/// Maximum number of opened streams that the handler has not accepted.
const ACCEPT_QUEUE_STREAMS: usize = 16;
/// Timeout of the last frames to the peer.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// Time that the peer has to close after them: closing a socket with unread data resets it, and the peer could lose
/// data that it has not read.
const LINGER_TIMEOUT: Duration = Duration::from_secs(3);

/// Interval of pings while a stream's consumer stalls. They detect a closed peer, whose unread data hides the close:
/// it answers a frame with a reset.
const STALL_PING_INTERVAL: Duration = Duration::from_secs(5);

/// Header and payload of a frame.
type Packet = (Bytes, Bytes);

/// A stream opened by the peer.
#[derive(Debug)]
pub(crate) struct Stream {
    pub id: u32,
    pub headers: Headers,
    /// Data from the peer.
    pub input: Input,
    /// Data to the peer.
    pub output: StreamOutput,
}

/// Receives opened streams; `None` after the last one.
pub(crate) type Accept = mpsc::Receiver<Stream>;

/// Writing half of a stream. Dropping it before [`StreamOutput::finish`] resets the stream.
#[derive(Debug)]
pub(crate) struct StreamOutput {
    id: u32,
    shared: Arc<Shared>,
    gone: CancellationToken,
    finished: bool,
}

impl StreamOutput {
    /// Sends `data`, waiting while the peer does not read.
    ///
    /// # Errors
    /// The stream was reset or its connection is closed.
    pub(crate) async fn write(&mut self, data: Bytes) -> Result<(), Gone> {
        let head = frame::data_head(self.id, data.len(), false);
        self.shared.send((head, data), &self.gone).await
    }

    /// Ends this direction; the peer may continue to send.
    pub(crate) async fn finish(mut self) {
        self.finished = true;
        let packet = (frame::data_head(self.id, 0, true), Bytes::new());
        let _ = self.shared.send(packet, &self.gone).await;
        self.shared.finished(self.id);
    }

    /// Resets the stream in both directions.
    pub(crate) async fn reset(mut self) {
        self.finished = true;
        let packet = (frame::reset(self.id, Reset::Cancel), Bytes::new());
        let _ = self.shared.send(packet, &self.gone).await;
        self.shared.forget(self.id);
    }
}

impl Drop for StreamOutput {
    fn drop(&mut self) {
        if !self.finished {
            // If the queue is full, the peer notices at the end of the connection.
            let packet = (frame::reset(self.id, Reset::Cancel), Bytes::new());
            let _ = self.shared.out.try_send(packet);
            self.shared.forget(self.id);
        }
    }
}

/// A stream in the table.
#[derive(Debug)]
struct Entry {
    /// `None` after the end of the peer's data.
    input: Option<mpsc::Sender<Bytes>>,
    /// True while this side may send more.
    open: bool,
    gone: CancellationToken,
}

#[derive(Debug)]
struct Shared {
    streams: Mutex<HashMap<u32, Entry>>,
    out: mpsc::Sender<Packet>,
}

impl Shared {
    fn streams(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.streams.lock()
    }

    async fn send(&self, packet: Packet, gone: &CancellationToken) -> Result<(), Gone> {
        tokio::select! {
            biased;
            () = gone.cancelled() => Err(Gone),
            sent = self.out.send(packet) => sent.map_err(|_| Gone),
        }
    }

    /// Marks the end of this side's data on a stream.
    fn finished(&self, id: u32) {
        let mut streams = self.streams();
        if let Some(entry) = streams.get_mut(&id) {
            entry.open = false;
            if entry.input.is_none() {
                streams.remove(&id);
            }
        }
    }

    fn forget(&self, id: u32) {
        if let Some(entry) = self.streams().remove(&id) {
            entry.gone.cancel();
        }
    }
}

/// Time of the last frame in either direction.
type Activity = Arc<Mutex<Instant>>;

fn touch(activity: &Activity) {
    *activity.lock() = Instant::now();
}

/// Reads frames and delivers them.
struct Receiver<R> {
    reader: Reader<R>,
    shared: Arc<Shared>,
    accept: mpsc::Sender<Stream>,
    gone: CancellationToken,
    deflater: Deflater,
    last: u32,
    activity: Activity,
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    /// Runs until the peer closes or breaks the protocol.
    async fn run(&mut self) -> Result<(), SpdyError> {
        while let Some(frame) = self.reader.next().await? {
            touch(&self.activity);
            match frame {
                Frame::Open { id, fin, headers } => self.open(id, fin, headers).await?,
                Frame::Data { id, fin, data } => self.deliver(id, fin, data).await,
                Frame::Reset { id } => self.shared.forget(id),
                // Even ids are the server's.
                Frame::Ping { id } if id % 2 == 1 => self.answer(frame::ping(id)).await,
                // The peer opens no more streams; existing streams continue until it closes.
                Frame::GoAway | Frame::Ping { .. } | Frame::Other => {}
            }
        }
        Ok(())
    }

    async fn answer(&mut self, frame: Bytes) {
        let _ = self.shared.send((frame, Bytes::new()), &self.gone).await;
    }

    async fn open(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), SpdyError> {
        if id.is_multiple_of(2) || id <= self.last {
            self.answer(frame::reset(id, Reset::ProtocolError)).await;
            return Ok(());
        }
        self.last = id;
        if self.shared.streams().len() >= MAX_STREAMS {
            self.answer(frame::reset(id, Reset::RefusedStream)).await;
            return Ok(());
        }
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE_CHUNKS);
        let gone = self.gone.child_token();
        let entry = Entry {
            input: (!fin).then_some(sender),
            open: true,
            gone: gone.clone(),
        };
        self.shared.streams().insert(id, entry);
        // Sent before the stream is delivered: a peer drops data that arrives before the reply.
        let block = self.deflater.empty_block();
        self.answer(frame::reply(id, &block)).await;
        let stream = Stream {
            id,
            headers,
            input: Input::new(receiver, gone.clone()),
            output: StreamOutput {
                id,
                shared: self.shared.clone(),
                gone,
                finished: false,
            },
        };
        // A handler that accepts no more streams drops the receiver; the dropped stream is then reset.
        tokio::select! {
            biased;
            () = self.gone.cancelled() => {}
            _ = self.accept.send(stream) => {}
        }
        Ok(())
    }

    async fn deliver(&mut self, id: u32, fin: bool, data: Bytes) {
        let (sender, gone) = match self.shared.streams().get(&id) {
            Some(entry) => (entry.input.clone(), entry.gone.clone()),
            None => return,
        };
        if let Some(sender) = sender
            && !data.is_empty()
        {
            let mut taking = std::pin::pin!(sender.send(data));
            loop {
                tokio::select! {
                    biased;
                    () = gone.cancelled() => break,
                    // An error means that the consumer has stopped; the data is discarded.
                    _ = &mut taking => break,
                    () = tokio::time::sleep(STALL_PING_INTERVAL) => {
                        // If the queue is full, the peer is being written to anyway.
                        let _ = self.shared.out.try_send((frame::ping(SERVER_PING_ID), Bytes::new()));
                    }
                }
            }
        }
        if fin {
            let mut streams = self.shared.streams();
            if let Some(entry) = streams.get_mut(&id) {
                entry.input = None;
                if !entry.open {
                    streams.remove(&id);
                }
            }
        }
    }
}

/// Writes frames until all senders are dropped.
async fn write_all<W: AsyncWrite + Unpin>(
    sink: W,
    mut packets: mpsc::Receiver<Packet>,
    activity: &Activity,
) -> std::io::Result<()> {
    let mut sink = BufWriter::with_capacity(64 << 10, sink);
    while let Some(packet) = packets.recv().await {
        let mut next = Some(packet);
        while let Some((head, payload)) = next {
            sink.write_all(&head).await?;
            sink.write_all(&payload).await?;
            next = packets.try_recv().ok();
        }
        sink.flush().await?;
        touch(activity);
    }
    sink.write_all(&frame::go_away(0)).await?;
    sink.shutdown().await
}

async fn idle_for(limit: Duration, activity: &Activity) {
    loop {
        let until = *activity.lock() + limit;
        if Instant::now() >= until {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

/// Serves the connection until `handler` returns; then sends the queued frames and GOAWAY and closes, with timeouts.
///
/// `gone` is cancelled if the peer disconnects, breaks the protocol or is silent for `idle`; the handler must end
/// soon after. Dropping the future drops the handler and closes the connection.
pub(crate) async fn serve<IO, H, F>(io: IO, idle: Duration, gone: CancellationToken, handler: H)
where
    IO: AsyncRead + AsyncWrite + Unpin,
    H: FnOnce(Accept) -> F,
    F: Future<Output = ()>,
{
    let (source, sink) = tokio::io::split(io);
    let (out, packets) = mpsc::channel(OUTPUT_QUEUE_FRAMES);
    let (accept, accepted) = mpsc::channel(ACCEPT_QUEUE_STREAMS);
    let activity = Arc::new(Mutex::new(Instant::now()));
    let mut receiver = Receiver {
        reader: Reader::new(source),
        shared: Arc::new(Shared {
            streams: Mutex::default(),
            out,
        }),
        accept,
        gone: gone.clone(),
        deflater: Deflater::default(),
        last: 0,
        activity: activity.clone(),
    };
    let mut writing = std::pin::pin!(write_all(sink, packets, &activity));
    let (mut reads, mut writes) = (true, true);
    {
        let mut reading = std::pin::pin!(receiver.run());
        let mut handling = std::pin::pin!(handler(accepted));
        let mut idling = std::pin::pin!(idle_for(idle, &activity));
        loop {
            tokio::select! {
                () = &mut handling => break,
                read = &mut reading, if reads => {
                    reads = false;
                    if let Err(error) = read {
                        tracing::debug!(error = boxlite_runtime::report(&error), "SPDY connection failed");
                    }
                    gone.cancel();
                }
                written = &mut writing, if writes => {
                    writes = false;
                    if let Err(error) = written {
                        tracing::debug!(%error, "failed to write to SPDY client");
                    }
                    gone.cancel();
                }
                () = &mut idling, if !gone.is_cancelled() => {
                    tracing::info!(seconds = idle.as_secs(), "closing idle streaming connection");
                    gone.cancel();
                }
            }
        }
    }
    let Receiver {
        mut reader,
        shared,
        accept,
        ..
    } = receiver;
    // The writer ends when all senders are dropped.
    drop((shared, accept));
    if gone.is_cancelled() || !writes {
        return;
    }
    // All senders are dropped now, so the writer ends with its queue.
    if let Ok(Ok(())) = tokio::time::timeout(FLUSH_TIMEOUT, writing).await {
        let _ = tokio::time::timeout(LINGER_TIMEOUT, discard(reader.source())).await;
    }
}

/// Reads and discards until the end.
async fn discard<R: AsyncRead + Unpin>(source: &mut R) {
    let mut buffer = [0; 4096];
    while source.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
