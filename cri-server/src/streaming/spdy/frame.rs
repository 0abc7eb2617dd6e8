//! Frames of SPDY/3.1: a reader with bounded chunks, and encoders.
//!
//! Streams are handled in `connection`. A data frame may have 16 MiB; it is not held completely, but delivered in
//! chunks as they arrive.

use super::SpdyError;
use super::headers::{Headers, Inflater};
use bytes::{BufMut, Bytes, BytesMut};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Maximum size of a chunk of a data frame.
pub(crate) const MAX_CHUNK_BYTES: usize = 16 << 10;
/// Maximum size of a control frame; header blocks of kubectl are smaller than 200 bytes.
const MAX_CONTROL_BYTES: usize = 16 << 10;
/// Control bit of a frame, with the version.
const CONTROL: u16 = 0x8003;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// Reason of a reset, as specified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reset {
    ProtocolError = 1,
    RefusedStream = 3,
    Cancel = 5,
}

/// A received frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    /// The peer opens a stream; with `fin` it sends no data on it.
    Open {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    /// A chunk of data; `fin` marks the peer's last on this stream.
    Data { id: u32, fin: bool, data: Bytes },
    /// The peer resets a stream.
    Reset { id: u32 },
    /// Must be echoed.
    Ping { id: u32 },
    /// The peer opens no more streams.
    GoAway,
    /// Irrelevant for a server.
    Other,
}

/// Reads frames.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    source: R,
    inflater: Inflater,
    buffer: BytesMut,
    /// Data frame in progress: stream, whether it ends the stream, remaining bytes.
    data: Option<(u32, bool, usize)>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Creates a reader for the start of a connection.
    pub(crate) fn new(source: R) -> Self {
        Self {
            source,
            inflater: Inflater::new(),
            buffer: BytesMut::new(),
            data: None,
        }
    }

    /// Returns the next frame or chunk; `None` if the peer closed between frames. Must not be called again after a
    /// dropped call.
    ///
    /// # Errors
    /// The connection failed, or the data is not SPDY/3.1 within the limits.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, SpdyError> {
        if let Some((id, last, left)) = self.data.take() {
            return self.chunk(id, last, left).await.map(Some);
        }
        let mut head = [0; 8];
        if self
            .source
            .read(&mut head[..1])
            .await
            .map_err(SpdyError::Io)?
            == 0
        {
            return Ok(None);
        }
        self.source
            .read_exact(&mut head[1..])
            .await
            .map_err(SpdyError::Io)?;
        let [a, b, c, d, flags, x, y, z] = head;
        let length = u32::from_be_bytes([0, x, y, z]) as usize;
        if a & 0x80 == 0 {
            let id = u32::from_be_bytes([a, b, c, d]);
            return self.chunk(id, flags & FIN != 0, length).await.map(Some);
        }
        if u16::from_be_bytes([a, b]) != CONTROL {
            return Err(SpdyError::Frame("unsupported version"));
        }
        if length > MAX_CONTROL_BYTES {
            return Err(SpdyError::Frame("control frame too large"));
        }
        self.fill(length).await?;
        let payload = self.buffer.split().freeze();
        self.control(u16::from_be_bytes([c, d]), flags, &payload)
            .map(Some)
    }

    /// Returns a chunk of the `left` bytes of a data frame; the rest remains for the next call.
    async fn chunk(&mut self, id: u32, last: bool, left: usize) -> Result<Frame, SpdyError> {
        let length = left.min(MAX_CHUNK_BYTES);
        self.fill(length).await?;
        let left = left - length;
        if left > 0 {
            self.data = Some((id, last, left));
        }
        Ok(Frame::Data {
            id,
            fin: last && left == 0,
            data: self.buffer.split().freeze(),
        })
    }

    async fn fill(&mut self, length: usize) -> Result<(), SpdyError> {
        self.buffer.reserve(length);
        while self.buffer.len() < length {
            let missing = length - self.buffer.len();
            let mut room = (&mut self.buffer).limit(missing);
            if self
                .source
                .read_buf(&mut room)
                .await
                .map_err(SpdyError::Io)?
                == 0
            {
                return Err(SpdyError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Frame, SpdyError> {
        match kind {
            SYN_STREAM => {
                // Stream, associated stream, priority and slot, then the headers.
                let id = word(payload)?;
                let block = payload
                    .get(10..)
                    .ok_or(SpdyError::Frame("truncated SYN_STREAM"))?;
                Ok(Frame::Open {
                    id,
                    fin: flags & FIN != 0,
                    headers: self.inflater.read(block)?,
                })
            }
            HEADERS | SYN_REPLY => {
                // The headers are irrelevant, but the compression state must advance.
                let block = payload
                    .get(4..)
                    .ok_or(SpdyError::Frame("truncated HEADERS"))?;
                self.inflater.read(block)?;
                match flags & FIN {
                    0 => Ok(Frame::Other),
                    _ => Ok(Frame::Data {
                        id: word(payload)?,
                        fin: true,
                        data: Bytes::new(),
                    }),
                }
            }
            RST_STREAM => Ok(Frame::Reset { id: word(payload)? }),
            PING => Ok(Frame::Ping {
                id: raw_word(payload)?,
            }),
            GOAWAY => Ok(Frame::GoAway),
            // SETTINGS and WINDOW_UPDATE: Kubernetes peers have no flow control in SPDY; TCP's applies.
            _ => Ok(Frame::Other),
        }
    }

    /// Returns the source, to discard the remaining data at the end.
    pub(crate) fn source(&mut self) -> &mut R {
        &mut self.source
    }
}

fn raw_word(payload: &[u8]) -> Result<u32, SpdyError> {
    payload
        .first_chunk::<4>()
        .map(|bytes| u32::from_be_bytes(*bytes))
        .ok_or(SpdyError::Frame("truncated control frame"))
}

/// Parses a stream id at the start of a payload.
fn word(payload: &[u8]) -> Result<u32, SpdyError> {
    Ok(raw_word(payload)? & 0x7fff_ffff)
}

fn control_frame(kind: u16, flags: u8, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(8 + payload.len());
    frame.put_u16(CONTROL);
    frame.put_u16(kind);
    frame.put_u32(u32::from(flags) << 24 | payload.len() as u32);
    frame.put_slice(payload);
    frame.freeze()
}

/// Encodes the reply to an opened stream.
pub(crate) fn reply(id: u32, block: &[u8]) -> Bytes {
    let mut payload = Vec::with_capacity(4 + block.len());
    payload.extend_from_slice(&id.to_be_bytes());
    payload.extend_from_slice(block);
    control_frame(SYN_REPLY, 0, &payload)
}

/// Encodes a reset of a stream.
pub(crate) fn reset(id: u32, why: Reset) -> Bytes {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&id.to_be_bytes());
    payload[4..].copy_from_slice(&(why as u32).to_be_bytes());
    control_frame(RST_STREAM, 0, &payload)
}

/// Encodes the answer to a ping.
pub(crate) fn ping(id: u32) -> Bytes {
    control_frame(PING, 0, &id.to_be_bytes())
}

/// Encodes a normal end of the connection; no stream after `last` was processed.
pub(crate) fn go_away(last: u32) -> Bytes {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&last.to_be_bytes());
    control_frame(GOAWAY, 0, &payload)
}

/// Encodes the header of a data frame with `length` bytes, at most 2^24 - 1.
pub(crate) fn data_head(id: u32, length: usize, fin: bool) -> Bytes {
    let mut head = BytesMut::with_capacity(8);
    head.put_u32(id & 0x7fff_ffff);
    head.put_u32(u32::from(fin) << 24 | (length as u32 & 0x00ff_ffff));
    head.freeze()
}
