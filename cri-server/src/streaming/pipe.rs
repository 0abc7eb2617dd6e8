//! Streams of a session independent of the transport: [`Input`] from the client, [`Output`] to it.
//!
//! SPDY and WebSocket create them (`spdy::connection`, `websocket`); exec, attach and port-forward use them. Both
//! apply back-pressure and hold only a few chunks.

use super::spdy::StreamOutput;
use super::websocket::channels::ChannelOutput;
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// The client or its stream is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("client disconnected")]
pub(crate) struct Gone;

/// Data from the client on one stream.
#[derive(Debug)]
pub(crate) struct Input {
    chunks: mpsc::Receiver<Bytes>,
    gone: CancellationToken,
}

impl Input {
    /// Creates the reading end of `chunks`; `gone` is cancelled if the stream ends without an end from the client.
    pub(crate) fn new(chunks: mpsc::Receiver<Bytes>, gone: CancellationToken) -> Self {
        Self { chunks, gone }
    }

    /// Returns the next chunk, or `Ok(None)` at the end. Cancel-safe.
    ///
    /// # Errors
    /// The stream was reset, or the client disconnected.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Gone> {
        tokio::select! {
            biased;
            chunk = self.chunks.recv() => match chunk {
                None if self.gone.is_cancelled() => Err(Gone),
                chunk => Ok(chunk),
            },
            () = self.gone.cancelled() => Err(Gone),
        }
    }

    /// Cancelled when the stream is closed.
    pub(crate) fn gone(&self) -> &CancellationToken {
        &self.gone
    }
}

/// Data to the client on one stream.
#[derive(Debug)]
pub(crate) enum Output {
    Spdy(StreamOutput),
    Channel(ChannelOutput),
}

impl Output {
    /// Sends `data`, waiting while the client does not read. On cancellation the bytes were sent completely or not at
    /// all.
    ///
    /// # Errors
    /// The client or its stream is closed.
    pub(crate) async fn write(&mut self, data: Bytes) -> Result<(), Gone> {
        match self {
            Self::Spdy(output) => output.write(data).await,
            Self::Channel(output) => output.write(data).await,
        }
    }

    /// Ends this stream.
    pub(crate) async fn finish(self) {
        match self {
            Self::Spdy(output) => output.finish().await,
            // A channel ends with the connection.
            Self::Channel(_) => {}
        }
    }

    /// Resets the stream, in both directions if the transport supports it.
    pub(crate) async fn reset(self) {
        match self {
            Self::Spdy(output) => output.reset().await,
            Self::Channel(_) => {}
        }
    }
}
