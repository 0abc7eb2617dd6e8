//! Streams of a session without their transport: [`Input`] from the client, [`Output`] to it.
//!
//! SPDY and WebSocket make them (`spdy::connection`, `websocket`); exec, attach and port-forward use them and know no
//! transport. Both wait where the other side does not keep up; neither holds more than a few chunks.

use super::spdy::StreamOutput;
use super::websocket::channels::ChannelOutput;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The client, or its stream, is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client is gone")]
pub struct Gone;

/// What a client sends on one stream.
#[derive(Debug)]
pub struct Input {
    chunks: mpsc::Receiver<Bytes>,
    gone: CancellationToken,
}

impl Input {
    /// The reading end of `chunks`; `gone` is cancelled when the stream ends without the client's saying so.
    pub fn new(chunks: mpsc::Receiver<Bytes>, gone: CancellationToken) -> Self {
        Self { chunks, gone }
    }

    /// The next chunk, `Ok(None)` after the client's last. May be dropped and called again.
    ///
    /// # Errors
    /// The stream was reset, or the client is gone.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Gone> {
        tokio::select! {
            biased;
            chunk = self.chunks.recv() => match chunk {
                None if self.gone.is_cancelled() => Err(Gone),
                chunk => Ok(chunk),
            },
            () = self.gone.cancelled() => Err(Gone),
        }
    }

    /// Cancelled when the stream is gone.
    pub fn gone(&self) -> &CancellationToken {
        &self.gone
    }
}

/// What a client is sent on one stream.
#[derive(Debug)]
pub enum Output {
    Spdy(StreamOutput),
    Channel(ChannelOutput),
}

impl Output {
    /// Sends `data`, waiting while the client does not read. Dropped midway, the bytes were sent whole or not at all.
    ///
    /// # Errors
    /// The client, or its stream, is gone.
    pub async fn write(&mut self, data: Bytes) -> Result<(), Gone> {
        match self {
            Self::Spdy(output) => output.write(data).await,
            Self::Channel(output) => output.write(data).await,
        }
    }

    /// Nothing more will come on this stream.
    pub async fn finish(self) {
        match self {
            Self::Spdy(output) => output.finish().await,
            // Its end is the connection's.
            Self::Channel(_) => {}
        }
    }

    /// Gives the stream up, in both directions where the transport can.
    pub async fn reset(self) {
        match self {
            Self::Spdy(output) => output.reset().await,
            Self::Channel(_) => {}
        }
    }
}
