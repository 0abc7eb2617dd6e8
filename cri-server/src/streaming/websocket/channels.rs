//! Numbered channels on a WebSocket: each message is a channel number and data, as binary or base64 text.
//!
//! [`serve`] drives one connection in the caller's task, like `spdy::serve`: reader, writer and the caller's handler
//! run concurrently, with the same bounds. A channel whose consumer stalls stalls the connection only.

use super::CLOSE_TIMEOUT;
use crate::streaming::input::{Gone, Input};
use crate::streaming::protocol::Version;
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

/// Maximum number of queued chunks per channel, of at most [`MAX_CHUNK_BYTES`] bytes.
const INPUT_QUEUE_CHUNKS: usize = 4;
/// Maximum size of a chunk; a message may be larger.
const MAX_CHUNK_BYTES: usize = 16 << 10;
/// Maximum number of queued messages to the peer.
const OUTPUT_QUEUE_MESSAGES: usize = 8;
/// Timeout of the last messages to the peer.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of keep-alive pongs. kubectl gives up after 61 s without one, and a reader blocked by a process that does
/// not read its input does not see pings. It also detects a closed peer, whose unread data hides the close: it
/// answers a pong with a reset.
const PONG_INTERVAL: Duration = Duration::from_secs(5);

/// Channels of exec and attach.
pub(crate) const STDIN: u8 = 0;
pub(crate) const STDOUT: u8 = 1;
pub(crate) const STDERR: u8 = 2;
pub(crate) const ERROR: u8 = 3;
pub(crate) const RESIZE: u8 = 4;
/// Since version 5: the next byte is the channel to close.
const CLOSE: u8 = 255;

/// Channel and data.
type Packet = (u8, Bytes);

/// Writing half of a channel. It ends with the connection: there is no message for it.
#[derive(Debug)]
pub(crate) struct ChannelOutput {
    channel: u8,
    out: mpsc::Sender<Packet>,
    gone: CancellationToken,
}

impl ChannelOutput {
    /// Sends `data`, waiting while the peer does not read.
    ///
    /// # Errors
    /// The connection is closed.
    pub(crate) async fn write(&mut self, data: Bytes) -> Result<(), Gone> {
        tokio::select! {
            biased;
            () = self.gone.cancelled() => Err(Gone),
            sent = self.out.send((self.channel, data)) => sent.map_err(|_| Gone),
        }
    }
}

/// Channels that a handler opens before the connection is served.
#[derive(Debug)]
pub(crate) struct Channels {
    inputs: HashMap<u8, mpsc::Sender<Bytes>>,
    out: mpsc::Sender<Packet>,
    gone: CancellationToken,
}

impl Channels {
    /// Returns the client's data on `channel`.
    pub(crate) fn input(&mut self, channel: u8) -> Input {
        let (sender, receiver) = mpsc::channel(INPUT_QUEUE_CHUNKS);
        self.inputs.insert(channel, sender);
        Input::new(receiver, self.gone.clone())
    }

    /// Returns the writing half of `channel`.
    pub(crate) fn output(&self, channel: u8) -> ChannelOutput {
        ChannelOutput {
            channel,
            out: self.out.clone(),
            gone: self.gone.clone(),
        }
    }

    /// Sends an empty message, which signals the connection to the client. For use before the first output.
    pub(crate) fn announce(&self, channel: u8) {
        // The queue is still empty.
        let _ = self.out.try_send((channel, Bytes::new()));
    }

    /// Cancelled when the client disconnects.
    pub(crate) fn gone(&self) -> &CancellationToken {
        &self.gone
    }
}

/// Decodes a message; `None` if it is invalid in the subprotocol.
pub(super) fn decode(message: Message, base64: bool) -> Option<(u8, Bytes)> {
    match message {
        Message::Binary(bytes) if !base64 => Some((*bytes.first()?, bytes.slice(1..))),
        Message::Text(text) if base64 => {
            let (channel, rest) = text.as_bytes().split_first()?;
            // A single digit: channel 255 belongs to a version without base64.
            let channel = channel.checked_sub(b'0').filter(|digit| *digit < 10)?;
            Some((channel, BASE64_STANDARD.decode(rest).ok()?.into()))
        }
        _ => None,
    }
}

/// Encodes a message.
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

/// Delivers messages to their channels.
struct Receiver<IO> {
    source: SplitStream<WebSocketStream<IO>>,
    inputs: HashMap<u8, mpsc::Sender<Bytes>>,
    version: Version,
    base64: bool,
    gone: CancellationToken,
    activity: Arc<Mutex<Instant>>,
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Receiver<IO> {
    /// Runs until the peer closes or breaks the protocol.
    async fn run(&mut self) {
        while let Some(message) = self.source.next().await {
            *self.activity.lock() = Instant::now();
            match message {
                Ok(Message::Close(_)) | Err(Error::ConnectionClosed) => return,
                Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_)) => {}
                Ok(message) => match decode(message, self.base64) {
                    Some((CLOSE, which)) if self.version >= Version::V5 => {
                        // Dropping the sender ends the channel.
                        which.first().map(|channel| self.inputs.remove(channel));
                    }
                    Some((channel, data)) => self.deliver(channel, data).await,
                    None => {
                        tracing::debug!("client sent an invalid WebSocket message");
                        return;
                    }
                },
                Err(error) => {
                    tracing::debug!(%error, "WebSocket connection failed");
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
                // The consumer has stopped; the rest is discarded.
                self.inputs.remove(&channel);
            }
        }
    }
}

/// Writes messages until all senders are dropped, then closes.
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

/// Serves the connection until `handler` returns; then sends the queued messages and closes, with timeouts. `open`
/// creates the handler of the channels, which must exist before the first message.
///
/// `gone` is cancelled if the peer disconnects, breaks the protocol or is silent for `idle`; the handler must end
/// soon after. Dropping the future drops the handler and closes the connection.
pub(crate) async fn serve<IO, H, F>(
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
    // The handler has clones.
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
                        tracing::debug!(%error, "failed to write to WebSocket client");
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
    drop(handling);
    if gone.is_cancelled() || !writes {
        return;
    }
    if let Ok(Ok(())) = tokio::time::timeout(FLUSH_TIMEOUT, writing).await {
        let rest = async { while let Some(Ok(_)) = receiver.source.next().await {} };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, rest).await;
    }
}
