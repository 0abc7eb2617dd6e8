//! Client side of SPDY/3.1: opens streams, sends and receives. Header blocks are written as stored deflate blocks (no
//! dictionary); the server's header blocks are ignored.

use super::MESSAGE_TIMEOUT;
use crate::bail;
use crate::failure::Result;
use boxlite_sys::sync::Mutex;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Transport of a connection.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

type Table = Arc<Mutex<HashMap<u32, mpsc::UnboundedSender<Bytes>>>>;

/// A SPDY connection.
pub(crate) struct Client {
    sink: WriteHalf<Box<dyn Io>>,
    /// Read half until the reader starts.
    source: Option<ReadHalf<Box<dyn Io>>>,
    reading: Option<JoinHandle<()>>,
    streams: Table,
    next: u32,
    first_block: bool,
}

/// An open stream.
pub(crate) struct Stream {
    pub id: u32,
    /// Incoming bytes; ends with the server's half-close, its reset, or the connection.
    pub incoming: mpsc::UnboundedReceiver<Bytes>,
}

impl Client {
    /// Creates a client on an upgraded connection. A task reads from it.
    pub(crate) fn new(socket: impl Io + 'static) -> Self {
        let mut client = Self::never_reading(socket);
        if let Some(source) = client.source.take() {
            client.reading = Some(tokio::spawn(read(source, client.streams.clone())));
        }
        client
    }

    /// Creates a client that never reads: the slowest possible client.
    pub(crate) fn never_reading(socket: impl Io + 'static) -> Self {
        let (source, sink) = tokio::io::split(Box::new(socket) as Box<dyn Io>);
        Self {
            sink,
            source: Some(source),
            reading: None,
            streams: Table::default(),
            next: 1,
            first_block: true,
        }
    }

    /// Opens a stream with these headers; names are in lower case.
    pub(crate) async fn open(&mut self, headers: &[(&str, &str)]) -> Result<Stream> {
        let id = self.next;
        self.next += 2;
        let (sender, incoming) = mpsc::unbounded_channel();
        self.table().insert(id, sender);
        let mut frame = id.to_be_bytes().to_vec();
        frame.extend_from_slice(&[0; 6]);
        frame.extend(self.block(headers));
        self.write(0x8003_0001, 0, &frame).await?;
        Ok(Stream { id, incoming })
    }

    /// Sends bytes on a stream; `fin` half-closes it.
    pub(crate) async fn send(&mut self, id: u32, data: &[u8], fin: bool) -> Result {
        let mut pieces = data.chunks(32 << 10).peekable();
        while let Some(piece) = pieces.next() {
            let last = fin && pieces.peek().is_none();
            self.write(id, u8::from(last), piece).await?;
        }
        if data.is_empty() {
            self.write(id, u8::from(fin), b"").await?;
        }
        Ok(())
    }

    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<u32, mpsc::UnboundedSender<Bytes>>> {
        self.streams.lock()
    }

    async fn write(&mut self, word: u32, flags: u8, payload: &[u8]) -> Result {
        let mut frame = Vec::with_capacity(8 + payload.len());
        frame.extend_from_slice(&word.to_be_bytes());
        frame.extend_from_slice(&(u32::from(flags) << 24 | payload.len() as u32).to_be_bytes());
        frame.extend_from_slice(payload);
        match tokio::time::timeout(MESSAGE_TIMEOUT, async {
            self.sink.write_all(&frame).await?;
            self.sink.flush().await
        })
        .await
        {
            Ok(written) => Ok(written?),
            Err(_) => bail!("the server takes no bytes within {MESSAGE_TIMEOUT:?}"),
        }
    }

    fn block(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut list = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            list.extend_from_slice(&(text.len() as u32).to_be_bytes());
            list.extend_from_slice(text.as_bytes());
        }
        let length = list.len() as u16;
        let mut block = Vec::new();
        if std::mem::take(&mut self.first_block) {
            block.extend_from_slice(&[0x78, 0x01]);
        }
        block.push(0);
        block.extend_from_slice(&length.to_le_bytes());
        block.extend_from_slice(&(!length).to_le_bytes());
        block.extend(list);
        // An empty block, as after zlib's sync flush: Go's inflate returns nothing before the next block's header.
        block.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
        block
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(reading) = &self.reading {
            reading.abort();
        }
    }
}

/// Dispatches frames to their streams until the connection ends.
async fn read(mut source: ReadHalf<Box<dyn Io>>, streams: Table) {
    let table = || streams.lock();
    let mut head = [0; 8];
    while source.read_exact(&mut head).await.is_ok() {
        let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
        let mut payload = vec![0; length];
        if source.read_exact(&mut payload).await.is_err() {
            break;
        }
        let word = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        if word & 0x8000_0000 == 0 {
            if let Some(stream) = table().get(&word) {
                let _ = stream.send(payload.into());
            }
            if head[4] & 1 == 1 {
                table().remove(&word);
            }
        } else if word == 0x8003_0003 && payload.len() >= 4 {
            let id = u32::from_be_bytes([payload[0], payload[1], payload[2], payload[3]]);
            table().remove(&id);
        }
    }
    table().clear();
}
