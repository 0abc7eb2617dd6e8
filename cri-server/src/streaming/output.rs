//! [`Output`]: data to a client on one stream, independent of the transport. A client that does not read blocks the writer.

use super::input::Gone;
use super::spdy::StreamOutput;
use super::websocket::channels::ChannelOutput;
use bytes::Bytes;

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
