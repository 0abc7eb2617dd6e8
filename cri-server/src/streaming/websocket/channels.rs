//! Numbered channels on a WebSocket: each message is the channel's number and its bytes, as binary or as text in base64.
//!
//! [`serve`] drives one connection in the caller's task, as `spdy::serve` does: reader, writer and the caller's handler
//! side by side, with the same bounds. A channel whose taker stalls stalls the connection and no other.

use super::CLOSE_TIMEOUT;
use crate::streaming::pipe::{Gone, Input, Output};
use crate::streaming::remote::{Remote, RequestedStreams, Version};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use boxlite_sys::sync::Mutex;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_util::sync::CancellationToken;

/// Chunks that wait for the taker of one channel, of at most [`MAX_CHUNK_BYTES`] bytes.
const INPUT_QUEUE_CHUNKS: usize = 4;
/// Largest chunk that is handed on, in bytes; a message may be larger.
const MAX_CHUNK_BYTES: usize = 16 << 10;
/// Messages that wait for the peer.
const OUTPUT_QUEUE_MESSAGES: usize = 8;
/// What the peer may take to read the last messages.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the peer is told that this side lives. kubectl gives up after 61 s without, and a reader that waits for a
/// process to take its input sees no ping. The other way round, a peer that closed cannot say so while what it sent before
/// is not read; to a pong it answers with a reset.
const PONG_INTERVAL: Duration = Duration::from_secs(5);

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
/// From version 5 on: the next byte is a channel that ends.
const CLOSE: u8 = 255;

/// Channel and bytes.
type Packet = (u8, Bytes);

/// The writing half of a channel. Its end is the connection's: there is no message for it.
#[derive(Debug)]
pub struct ChannelOutput {
    channel: u8,
    out: mpsc::Sender<Packet>,
    gone: CancellationToken,
}

impl ChannelOutput {
    /// Sends `data`, waiting while the peer does not read.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn write(&mut self, data: Bytes) -> Result<(), Gone> {
        tokio::select! {
            biased;
            () = self.gone.cancelled() => Err(Gone),
            sent = self.out.send((self.channel, data)) => sent.map_err(|_| Gone),
        }
    }
}

/// The channels that a handler may open, before the connection is served.
#[derive(Debug)]
pub struct Channels {
    inputs: HashMap<u8, mpsc::Sender<Bytes>>,
    out: mpsc::Sender<Packet>,
    gone: CancellationToken,
}

impl Channels {
    /// What the client sends on `channel`.
    pub fn input(&mut self, channel: u8) -> Input {
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE_CHUNKS);
        self.inputs.insert(channel, sender);
        Input::new(receiver, self.gone.clone())
    }

    /// What it is sent on `channel`.
    pub fn output(&self, channel: u8) -> Output {
        Output::Channel(ChannelOutput {
            channel,
            out: self.out.clone(),
            gone: self.gone.clone(),
        })
    }

    /// The channels of a remote command. The client is told that it is connected by an empty message on its lowest
    /// channel.
    pub fn remote(&mut self, wanted: RequestedStreams, version: Version) -> Remote {
        let lowest = match wanted {
            RequestedStreams { stdout: true, .. } => STDOUT,
            RequestedStreams { stderr: true, .. } => STDERR,
            _ => ERROR,
        };
        // The queue is empty yet.
        let _ = self.out.try_send((lowest, Bytes::new()));
        Remote {
            stdin: wanted.stdin.then(|| self.input(STDIN)),
            stdout: wanted.stdout.then(|| self.output(STDOUT)),
            stderr: wanted.stderr.then(|| self.output(STDERR)),
            error: self.output(ERROR),
            resize: wanted.tty.then(|| self.input(RESIZE)),
            version,
            gone: self.gone.clone(),
            unused: Vec::new(),
        }
    }
}

/// The bytes of a message, by the subprotocol; `None` for what is none of it.
pub(super) fn decode(message: Message, base64: bool) -> Option<(u8, Bytes)> {
    match message {
        Message::Binary(bytes) if !base64 => Some((*bytes.first()?, bytes.slice(1..))),
        Message::Text(text) if base64 => {
            let (channel, rest) = text.as_bytes().split_first()?;
            // One digit: channel 255 is of a version that has no base64.
            let channel = channel.checked_sub(b'0').filter(|digit| *digit < 10)?;
            Some((channel, BASE64_STANDARD.decode(rest).ok()?.into()))
        }
        _ => None,
    }
}

/// A message of the subprotocol.
pub(super) fn encode((channel, data): Packet, base64: bool) -> Message {
    if base64 {
        let mut text = String::with_capacity(1 + data.len().div_ceil(3) * 4);
        text.push(char::from(b'0' + channel % 10));
        BASE64_STANDARD.encode_string(&data, &mut text);
        return Message::text(text);
    }
    let mut bytes = BytesMut::with_capacity(1 + data.len());
    bytes.put_u8(channel);
    bytes.put_slice(&data);
    Message::Binary(bytes.freeze())
}

/// Hands messages to their channels.
struct Receiver<IO> {
    source: SplitStream<WebSocketStream<IO>>,
    inputs: HashMap<u8, mpsc::Sender<Bytes>>,
    version: Version,
    base64: bool,
    gone: CancellationToken,
    activity: Arc<Mutex<Instant>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Receiver<IO> {
    /// Until the peer closes or breaks the protocol.
    async fn run(&mut self) {
        while let Some(message) = self.source.next().await {
            *self.activity.lock() = Instant::now();
            match message {
                Ok(Message::Close(_)) | Err(Error::ConnectionClosed) => return,
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
                Ok(message) => match decode(message, self.base64) {
                    Some((CLOSE, which)) if self.version >= Version::V5 => {
                        // Dropped, the sender ends the channel.
                        which.first().map(|channel| self.inputs.remove(channel));
                    }
                    Some((channel, data)) => self.deliver(channel, data).await,
                    None => {
                        tracing::debug!("WebSocket client sent what its subprotocol does not have");
                        return;
                    }
                },
                Err(error) => {
                    tracing::debug!(%error, "WebSocket connection broke");
                    return;
                }
            }
        }
    }

    async fn deliver(&mut self, channel: u8, mut data: Bytes) {
        while !data.is_empty() {
            let Some(sender) = self.inputs.get(&channel) else {
                return;
            };
            let chunk = data.split_to(data.len().min(MAX_CHUNK_BYTES));
            let sent = tokio::select! {
                biased;
                () = self.gone.cancelled() => return,
                sent = sender.send(chunk) => sent,
            };
            if sent.is_err() {
                // The taker wants no more; the rest goes nowhere.
                self.inputs.remove(&channel);
            }
        }
    }
}

/// Writes messages until all senders are gone, then the close.
async fn write_all<IO: AsyncRead + AsyncWrite + Unpin>(
    mut sink: SplitSink<WebSocketStream<IO>, Message>,
    mut packets: mpsc::Receiver<Packet>,
    base64: bool,
    activity: &Mutex<Instant>,
) -> Result<(), Error> {
    let mut alive = tokio::time::interval(PONG_INTERVAL);
    alive.reset();
    loop {
        let packet = tokio::select! {
            packet = packets.recv() => packet,
            _ = alive.tick() => {
                sink.send(Message::Pong(Bytes::new())).await?;
                continue;
            }
        };
        let Some(packet) = packet else { break };
        sink.feed(encode(packet, base64)).await?;
        while let Ok(packet) = packets.try_recv() {
            sink.feed(encode(packet, base64)).await?;
        }
        sink.flush().await?;
        *activity.lock() = Instant::now();
    }
    let close = CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    };
    sink.send(Message::Close(Some(close))).await
}

async fn idle_for(limit: Duration, activity: &Mutex<Instant>) {
    loop {
        let until = *activity.lock() + limit;
        if Instant::now() >= until {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

/// Serves the connection until `handler` returns; then sends what is queued and closes, within limits. `open` makes the
/// handler of the channels, which must be known before the first message.
///
/// `gone` is cancelled when the peer is gone, has broken the protocol or was silent for `idle`; the handler must end
/// soon after. Dropping the future drops the handler and closes the connection.
pub async fn serve<IO, H, F>(
    socket: WebSocketStream<IO>,
    (version, base64): (Version, bool),
    idle: Duration,
    gone: CancellationToken,
    open: H,
) where
    IO: AsyncRead + AsyncWrite + Unpin,
    H: FnOnce(&mut Channels) -> F,
    F: Future<Output = ()>,
{
    let (sink, source) = socket.split();
    let (out, packets) = mpsc::channel(OUTPUT_QUEUE_MESSAGES);
    let mut channels = Channels {
        inputs: HashMap::new(),
        out,
        gone: gone.clone(),
    };
    let mut handling = Box::pin(open(&mut channels));
    let activity = Arc::new(Mutex::new(Instant::now()));
    let Channels { inputs, out, .. } = channels;
    // The handler has its own.
    drop(out);
    let mut receiver = Receiver {
        source,
        inputs,
        version,
        base64,
        gone: gone.clone(),
        activity: activity.clone(),
    };
    let mut writing = std::pin::pin!(write_all(sink, packets, base64, &activity));
    let (mut reads, mut writes) = (true, true);
    {
        let mut reading = std::pin::pin!(receiver.run());
        let mut idling = std::pin::pin!(idle_for(idle, &activity));
        loop {
            tokio::select! {
                () = &mut handling => break,
                () = &mut reading, if reads => {
                    reads = false;
                    gone.cancel();
                }
                written = &mut writing, if writes => {
                    writes = false;
                    if let Err(error) = written {
                        tracing::debug!(%error, "WebSocket peer takes no more");
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
    drop(handling);
    if gone.is_cancelled() || !writes {
        return;
    }
    if let Ok(Ok(())) = tokio::time::timeout(FLUSH_TIMEOUT, writing).await {
        let rest = async { while let Some(Ok(_)) = receiver.source.next().await {} };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, rest).await;
    }
}
