//! One SPDY/3.1 connection on the server's side: streams that the peer opens, many at a time.
//!
//! [`serve`] drives it in the caller's task: a reader, a writer and the caller's handler side by side. It holds
//! [`INPUT_QUEUE_CHUNKS`] chunks for each stream and [`OUTPUT_QUEUE_FRAMES`] frames for the peer and then waits: a stream whose
//! taker stalls stalls the connection (SPDY's Kubernetes peers have no flow control but TCP's), and no other one. What
//! streams mean is the handler's affair.
//!
//! ```text
//!  socket ─▶ frame::Reader ─▶ run ─▶ Input of a stream ─▶ handler ─▶ Output ─▶ queue ─▶ write_all ─▶ socket
//!                              └─ new Stream ─▶ accept queue ─┘
//! ```

use super::SpdyError;
use super::frame::{self, Frame, Reader, Reset};
use super::headers::{Deflater, Headers};
use crate::streaming::pipe::{Gone, Input};
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

/// Chunks of at most 16 KiB that wait for the taker of one stream.
const INPUT_QUEUE_CHUNKS: usize = 4;
/// Frames that wait for the peer.
const OUTPUT_QUEUE_FRAMES: usize = 8;
/// Streams of one connection at a time: a forwarded TCP connection takes two.
pub const MAX_STREAMS: usize = 512;
/// Id of this side's pings, an even number; nobody waits for the answer.
const SERVER_PING_ID: u32 = 2;
/// Opened streams that the handler has not looked at yet.
const ACCEPT_QUEUE_STREAMS: usize = 16;
/// What the peer may take to read the last frames.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// What the peer may take to close after them: a socket closed with something unread in it is reset, and the peer could
/// lose what it has not read yet.
const LINGER_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a stream's taker may stall before the peer is pinged, and again. A peer that closed cannot say so while what it
/// sent before is not read; to a frame it answers with a reset.
const STALL_PING_INTERVAL: Duration = Duration::from_secs(5);

/// Head and payload of a frame.
type Packet = (Bytes, Bytes);

/// A stream that the peer opened.
#[derive(Debug)]
pub struct Stream {
    pub id: u32,
    pub headers: Headers,
    /// What the peer sends.
    pub input: Input,
    /// What it is sent.
    pub output: StreamOutput,
}

/// Where opened streams come from; `None` when no more will come.
pub type Accept = mpsc::Receiver<Stream>;

/// The writing half of a stream. Dropped before [`StreamOutput::finish`] it resets the stream.
#[derive(Debug)]
pub struct StreamOutput {
    id: u32,
    shared: Arc<Shared>,
    gone: CancellationToken,
    finished: bool,
}

impl StreamOutput {
    /// Sends `data`, waiting while the peer does not read.
    ///
    /// # Errors
    /// The stream was reset or its connection is gone.
    pub async fn write(&mut self, data: Bytes) -> Result<(), Gone> {
        let head = frame::data_head(self.id, data.len(), false);
        self.shared.send((head, data), &self.gone).await
    }

    /// Nothing more will be sent; the peer may go on.
    pub async fn finish(mut self) {
        self.finished = true;
        let packet = (frame::data_head(self.id, 0, true), Bytes::new());
        let _ = self.shared.send(packet, &self.gone).await;
        self.shared.finished(self.id);
    }

    /// Gives the stream up in both directions.
    pub async fn reset(mut self) {
        self.finished = true;
        let packet = (frame::reset(self.id, Reset::Cancel), Bytes::new());
        let _ = self.shared.send(packet, &self.gone).await;
        self.shared.forget(self.id);
    }
}

impl Drop for StreamOutput {
    fn drop(&mut self) {
        if !self.finished {
            // Where the queue is full the peer learns it with the connection's end.
            let packet = (frame::reset(self.id, Reset::Cancel), Bytes::new());
            let _ = self.shared.out.try_send(packet);
            self.shared.forget(self.id);
        }
    }
}

/// A stream in the table.
#[derive(Debug)]
struct Entry {
    /// `None` once the peer has sent its last.
    input: Option<mpsc::Sender<Bytes>>,
    /// Whether this side has more to send.
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

    /// This side has sent its last on a stream.
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

/// When the last frame came or went.
type Activity = Arc<Mutex<Instant>>;

fn touch(activity: &Activity) {
    *activity.lock() = Instant::now();
}

/// Reads frames and hands them on.
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
    /// Until the peer closes, or breaks the protocol.
    async fn run(&mut self) -> Result<(), SpdyError> {
        while let Some(frame) = self.reader.next().await? {
            touch(&self.activity);
            match frame {
                Frame::Open { id, fin, headers } => self.open(id, fin, headers).await?,
                Frame::Data { id, fin, data } => self.deliver(id, fin, data).await,
                Frame::Reset { id } => self.shared.forget(id),
                // Even numbers are this side's own.
                Frame::Ping { id } if id % 2 == 1 => self.answer(frame::ping(id)).await,
                // The peer opens no more streams; those there are go on until it closes.
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
        // Before the stream is known to anybody: a peer drops data that comes before the reply.
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
        // A handler that takes no more streams drops the receiver; the dropped stream is then reset.
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
                    // An error: the taker wants no more, and the bytes go nowhere.
                    _ = &mut taking => break,
                    () = tokio::time::sleep(STALL_PING_INTERVAL) => {
                        // Where the queue is full the peer is written to anyway.
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

/// Writes frames until all senders are gone.
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

/// Serves the connection until `handler` returns; then sends what is queued, says go-away and closes, within limits.
///
/// `gone` is cancelled when the peer is gone, has broken the protocol or was silent for `idle`; the handler must end
/// soon after. Dropping the future drops the handler and closes the connection.
pub async fn serve<IO, H, F>(io: IO, idle: Duration, gone: CancellationToken, handler: H)
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
                        tracing::debug!(error = boxlite_runtime::report(&error), "SPDY connection broke");
                    }
                    gone.cancel();
                }
                written = &mut writing, if writes => {
                    writes = false;
                    if let Err(error) = written {
                        tracing::debug!(%error, "SPDY peer takes no more");
                    }
                    gone.cancel();
                }
                () = &mut idling, if !gone.is_cancelled() => {
                    tracing::info!(seconds = idle.as_secs(), "streaming connection was idle for too long");
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
    // Its senders, or the writer would not end.
    drop((shared, accept));
    if gone.is_cancelled() || !writes {
        return;
    }
    // All senders are gone now, so the writer ends with its queue.
    if let Ok(Ok(())) = tokio::time::timeout(FLUSH_TIMEOUT, writing).await {
        let _ = tokio::time::timeout(LINGER_TIMEOUT, discard(reader.source())).await;
    }
}

/// Reads to the end.
async fn discard<R: AsyncRead + Unpin>(source: &mut R) {
    let mut buffer = [0; 4096];
    while source.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
}
