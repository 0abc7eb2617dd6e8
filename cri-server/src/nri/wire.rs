//! Wire format of an NRI socket: frames of a multiplexed trunk that carry ttrpc messages.
//!
//! ```text
//! frame    connection u32 BE, length u32 BE, bytes          connection 1: the plugin serves, 2: the runtime serves
//! message  length u32 BE, stream u32 BE, kind u8, flags u8, payload        a byte stream within one connection
//! ```
//!
//! The ttrpc crate needs a socket, not a stream of frames, and plugins depend on the frame boundaries (see
//! [`write`]), so both layers are implemented here. The calls are in [`super::connection`].

use bytes::{Buf, BytesMut};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Id of the connection on which the plugin serves.
pub(crate) const PLUGIN_SERVICE: u32 = 1;
/// Id of the connection on which the runtime serves.
pub(crate) const RUNTIME_SERVICE: u32 = 2;
/// Maximum payload of a message: ttrpc's limit, which plugins enforce, too.
pub(crate) const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// ttrpc's message type of a request.
pub(crate) const REQUEST: u8 = 1;
/// ttrpc's message type of a response.
pub(crate) const RESPONSE: u8 = 2;

const FRAME_HEADER_BYTES: usize = 8;
const MESSAGE_HEADER_BYTES: usize = 10;
/// Maximum size of a frame: a whole message, as in the published multiplexer.
const MAX_FRAME_BYTES: usize = MESSAGE_HEADER_BYTES + MAX_MESSAGE_BYTES;
/// Buffer size of a Go plugin's ttrpc reader (bufio's default).
const READER_BUFFER_BYTES: usize = 4096;

/// Failure of a trunk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// The socket failed.
    #[error("failed to use the socket of the plugin")]
    Io(#[from] io::Error),
    /// A length exceeds its limit.
    #[error("{what} too large: {bytes} bytes (maximum {limit})")]
    TooLarge {
        what: &'static str,
        bytes: usize,
        limit: usize,
    },
}

/// ttrpc's request.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Request {
    #[prost(string, tag = "1")]
    pub service: String,
    #[prost(string, tag = "2")]
    pub method: String,
    #[prost(bytes = "vec", tag = "3")]
    pub payload: Vec<u8>,
    /// Timeout of the caller; a Go plugin derives the context of its handler from it.
    #[prost(int64, tag = "4")]
    pub timeout_nano: i64,
}

/// ttrpc's response: a status other than ok, or a payload.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Response {
    #[prost(message, optional, tag = "1")]
    pub status: Option<RpcStatus>,
    #[prost(bytes = "vec", tag = "2")]
    pub payload: Vec<u8>,
}

/// google.rpc.Status without details.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct RpcStatus {
    #[prost(int32, tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
}

/// A ttrpc message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub stream: u32,
    pub kind: u8,
    pub payload: Vec<u8>,
}

/// Assembles the messages of one connection.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    bytes: BytesMut,
}

impl Assembler {
    /// Adds the bytes of a frame.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Returns the next complete message. Holds at most a message and a frame if it is called until `None` after each
    /// push.
    pub(crate) fn next(&mut self) -> Result<Option<Message>, WireError> {
        let Some(mut header) = self.bytes.get(..MESSAGE_HEADER_BYTES) else {
            return Ok(None);
        };
        let length = header.get_u32() as usize;
        let stream = header.get_u32();
        let kind = header.get_u8();
        if length > MAX_MESSAGE_BYTES {
            return Err(WireError::TooLarge {
                what: "message",
                bytes: length,
                limit: MAX_MESSAGE_BYTES,
            });
        }
        if self.bytes.len() < MESSAGE_HEADER_BYTES + length {
            return Ok(None);
        }
        self.bytes.advance(MESSAGE_HEADER_BYTES);
        let payload = self.bytes.split_to(length).to_vec();
        Ok(Some(Message {
            stream,
            kind,
            payload,
        }))
    }
}

/// Reads the next frame; returns `None` at the end of the stream. Dropping the future loses a partially read frame.
pub(crate) async fn read(
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<Option<(u32, Vec<u8>)>, WireError> {
    let mut header = [0; FRAME_HEADER_BYTES];
    match reader.read_exact(&mut header).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let mut fields = &header[..];
    let connection = fields.get_u32();
    let length = fields.get_u32() as usize;
    if length > MAX_FRAME_BYTES {
        return Err(WireError::TooLarge {
            what: "frame",
            bytes: length,
            limit: MAX_FRAME_BYTES,
        });
    }
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).await?;
    Ok(Some((connection, bytes)))
}

/// Writes a message in at most two frames: the size of a Go plugin's read buffer, then the rest.
///
/// A Go plugin reads a frame by one `Read` and fails with ENOMEM if its buffer is smaller than the frame. The buffer
/// is empty at the start of a message and has [`READER_BUFFER_BYTES`] bytes; the rest of a payload is read directly
/// into its destination. Dropping the future leaves a partial message, which makes the trunk unusable.
pub(crate) async fn write(
    writer: &mut (impl AsyncWrite + Unpin),
    connection: u32,
    message: &Message,
) -> Result<(), WireError> {
    let length = message.payload.len();
    if length > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLarge {
            what: "message",
            bytes: length,
            limit: MAX_MESSAGE_BYTES,
        });
    }
    let mut bytes = Vec::with_capacity(MESSAGE_HEADER_BYTES + length);
    // Fits because it is below the limit.
    bytes.extend_from_slice(&(length as u32).to_be_bytes());
    bytes.extend_from_slice(&message.stream.to_be_bytes());
    bytes.extend_from_slice(&[message.kind, 0]);
    bytes.extend_from_slice(&message.payload);
    let (first, rest) = bytes.split_at(bytes.len().min(READER_BUFFER_BYTES));
    for part in [first, rest] {
        if part.is_empty() {
            continue;
        }
        let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + part.len());
        frame.extend_from_slice(&connection.to_be_bytes());
        frame.extend_from_slice(&(part.len() as u32).to_be_bytes());
        frame.extend_from_slice(part);
        writer.write_all(&frame).await?;
    }
    writer.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(length: usize) -> Message {
        Message {
            stream: 7,
            kind: REQUEST,
            payload: (0..length).map(|at| at as u8).collect(),
        }
    }

    async fn frames(message: &Message) -> Vec<(u32, Vec<u8>)> {
        let mut bytes = Vec::new();
        write(&mut bytes, PLUGIN_SERVICE, message).await.unwrap();
        let (mut rest, mut found) = (&bytes[..], Vec::new());
        while let Some(frame) = read(&mut rest).await.unwrap() {
            found.push(frame);
        }
        found
    }

    #[tokio::test]
    async fn write_splits_message_for_go_readers() {
        for (length, cuts) in [
            (0, vec![10]),
            (4086, vec![4096]),
            (4087, vec![4096, 1]),
            (MAX_MESSAGE_BYTES, vec![4096, MAX_MESSAGE_BYTES - 4086]),
        ] {
            let frames = frames(&message(length)).await;
            let lengths: Vec<usize> = frames.iter().map(|(_, bytes)| bytes.len()).collect();
            assert_eq!(lengths, cuts, "{length}");
            assert!(frames.iter().all(|(connection, _)| *connection == 1));
            let mut assembler = Assembler::default();
            for (_, bytes) in &frames {
                assembler.push(bytes);
            }
            assert_eq!(assembler.next().unwrap(), Some(message(length)));
            assert_eq!(assembler.next().unwrap(), None);
        }
    }

    #[tokio::test]
    async fn oversized_frames_and_messages_are_rejected() {
        assert!(
            write(&mut Vec::new(), 1, &message(MAX_MESSAGE_BYTES + 1))
                .await
                .is_err()
        );
        let frame = [&1u32.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
        assert!(matches!(
            read(&mut &frame[..]).await,
            Err(WireError::TooLarge { .. })
        ));
        let mut assembler = Assembler::default();
        assembler.push(&[0xff; MESSAGE_HEADER_BYTES]);
        assert!(matches!(assembler.next(), Err(WireError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn assembler_is_independent_of_chunk_sizes(lengths in proptest::collection::vec(0usize..300, 1..6), step in 1usize..64) {
            let messages: Vec<Message> = lengths.into_iter().map(message).collect();
            let bytes = futures::executor::block_on(async {
                let mut bytes = Vec::new();
                for message in &messages {
                    for (_, part) in frames(message).await {
                        bytes.extend(part);
                    }
                }
                bytes
            });
            let (mut assembler, mut found) = (Assembler::default(), Vec::new());
            for part in bytes.chunks(step) {
                assembler.push(part);
                while let Some(message) = assembler.next().unwrap() {
                    found.push(message);
                }
            }
            prop_assert_eq!(found, messages);
        }

        #[test]
        fn assembler_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut assembler = Assembler::default();
            assembler.push(&bytes);
            while let Ok(Some(_)) = assembler.next() {}
        }
    }

    #[test]
    fn fuzz_stream_of_a_plugin_is_read_or_rejected() {
        use prost::Message as _;
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.build().expect("a runtime");
        let mut seed = Vec::new();
        for length in [0, 5, 300] {
            for (connection, bytes) in runtime.block_on(frames(&message(length))) {
                seed.extend(connection.to_be_bytes());
                seed.extend((bytes.len() as u32).to_be_bytes());
                seed.extend(bytes);
            }
        }
        boxlite_fuzz::Fuzz::new("nri").seed(seed).run(|mut input| {
            runtime.block_on(async {
                let mut assembler = Assembler::default();
                while let Ok(Some((_, bytes))) = read(&mut input).await {
                    assembler.push(&bytes);
                    while let Ok(Some(message)) = assembler.next() {
                        assert!(message.payload.len() <= MAX_MESSAGE_BYTES);
                        drop(Request::decode(&message.payload[..]));
                        drop(Response::decode(&message.payload[..]));
                    }
                }
            });
        });
    }
}
