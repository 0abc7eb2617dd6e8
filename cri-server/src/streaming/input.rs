//! [`Input`]: data of a client on one stream, independent of the transport.
//!
//! SPDY and WebSocket create it (`spdy::connection`, `websocket::channels`); exec, attach and port-forward read it. It
//! holds only a few chunks, so that a slow reader slows the client.

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
