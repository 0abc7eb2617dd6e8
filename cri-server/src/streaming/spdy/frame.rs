//! Frames of SPDY/3.1: what arrives, read in bounded chunks, and what is sent, as bytes.
//!
//! It keeps no stream and decides nothing: `connection` does. A data frame may be 16 MiB long by the protocol; it is
//! never held as a whole, but handed on in chunks as they come.

use super::SpdyError;
use super::headers::{Headers, Inflater};
use bytes::{BufMut, Bytes, BytesMut};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Largest chunk of a data frame that is handed on at once, in bytes.
pub const MAX_CHUNK_BYTES: usize = 16 << 10;
/// Largest control frame that is read, in bytes: header blocks of kubectl have less than 200.
const MAX_CONTROL_BYTES: usize = 16 << 10;
/// Top bit of a frame, and the version.
const CONTROL: u16 = 0x8003;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// Why a stream is reset, by the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    ProtocolError = 1,
    RefusedStream = 3,
    Cancel = 5,
}

/// What arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// The peer opens a stream; `fin`: and will send nothing on it.
    Open {
        id: u32,
        fin: bool,
        headers: Headers,
    },
    /// A chunk of data; `fin`: the peer's last on this stream.
    Data { id: u32, fin: bool, data: Bytes },
    /// The peer gives a stream up.
    Reset { id: u32 },
    /// To be sent back.
    Ping { id: u32 },
    /// The peer opens no more streams.
    GoAway,
    /// Nothing that matters to a server of streams.
    Other,
}

/// Reads frames.
#[derive(Debug)]
pub struct Reader<R> {
    source: R,
    inflater: Inflater,
    buffer: BytesMut,
    /// Of the data frame under way: stream, whether its end is the peer's last, bytes still to come.
    data: Option<(u32, bool, usize)>,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// At the start of a connection.
    pub fn new(source: R) -> Self {
        Self {
            source,
            inflater: Inflater::new(),
            buffer: BytesMut::new(),
            data: None,
        }
    }

    /// The next frame, or chunk of one; `None` where the peer closed between two frames. Dropped midway it must not be
    /// called again.
    ///
    /// # Errors
    /// A broken connection, or what is not SPDY/3.1 within the limits.
    pub async fn next(&mut self) -> Result<Option<Frame>, SpdyError> {
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
            return Err(SpdyError::Frame("a control frame of another version"));
        }
        if length > MAX_CONTROL_BYTES {
            return Err(SpdyError::Frame("a control frame is too large"));
        }
        self.fill(length).await?;
        let payload = self.buffer.split().freeze();
        self.control(u16::from_be_bytes([c, d]), flags, &payload)
            .map(Some)
    }

    /// Some of the `left` bytes of a data frame; what is not read stays for the next call.
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
                    .ok_or(SpdyError::Frame("SYN_STREAM is cut short"))?;
                Ok(Frame::Open {
                    id,
                    fin: flags & FIN != 0,
                    headers: self.inflater.read(block)?,
                })
            }
            HEADERS | SYN_REPLY => {
                // Their content is of no interest, but the compression goes on through it.
                let block = payload
                    .get(4..)
                    .ok_or(SpdyError::Frame("HEADERS is cut short"))?;
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
            // SETTINGS and WINDOW_UPDATE: no Kubernetes peer has flow control in SPDY; TCP's is what holds a sender.
            _ => Ok(Frame::Other),
        }
    }

    /// The source, for what is to be thrown away at the end.
    pub fn source(&mut self) -> &mut R {
        &mut self.source
    }
}

fn raw_word(payload: &[u8]) -> Result<u32, SpdyError> {
    payload
        .first_chunk::<4>()
        .map(|bytes| u32::from_be_bytes(*bytes))
        .ok_or(SpdyError::Frame("a control frame is cut short"))
}

/// A stream id at the start of a payload.
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

/// The answer to an opened stream.
pub fn reply(id: u32, block: &[u8]) -> Bytes {
    let mut payload = Vec::with_capacity(4 + block.len());
    payload.extend_from_slice(&id.to_be_bytes());
    payload.extend_from_slice(block);
    control_frame(SYN_REPLY, 0, &payload)
}

/// Gives a stream up.
pub fn reset(id: u32, why: Reset) -> Bytes {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&id.to_be_bytes());
    payload[4..].copy_from_slice(&(why as u32).to_be_bytes());
    control_frame(RST_STREAM, 0, &payload)
}

/// An answer to a ping.
pub fn ping(id: u32) -> Bytes {
    control_frame(PING, 0, &id.to_be_bytes())
}

/// No stream after `last` was looked at, and the connection ends well.
pub fn go_away(last: u32) -> Bytes {
    let mut payload = [0; 8];
    payload[..4].copy_from_slice(&last.to_be_bytes());
    control_frame(GOAWAY, 0, &payload)
}

/// Head of a data frame with `length` bytes, at most 2^24 - 1.
pub fn data_head(id: u32, length: usize, fin: bool) -> Bytes {
    let mut head = BytesMut::with_capacity(8);
    head.put_u32(id & 0x7fff_ffff);
    head.put_u32(u32::from(fin) << 24 | (length as u32 & 0x00ff_ffff));
    head.freeze()
}
