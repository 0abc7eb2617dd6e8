//! WebSocket subprotocols of Kubernetes: numbered channels (`channels`: exec, attach, and port-forward's first
//! protocol), and SPDY tunneled in binary messages (`tunnel`: port-forward's second).
//!
//! RFC 6455 is implemented by tokio-tungstenite.

pub(crate) mod channels;
#[cfg(test)]
mod tests;
mod tunnel;

pub(crate) use tunnel::Tunnel;

use super::protocol::Version;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// Maximum size of a received message; kubectl's are 32 KiB.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// Size from which the library writes to the socket.
const WRITE_BUFFER_BYTES: usize = 64 << 10;
/// Maximum size of the library's write buffer. It answers every ping: without a limit, a peer that sends pings and does not read
/// fills the memory with pongs. With it, the library keeps the latest pong only.
const MAX_WRITE_BUFFER_BYTES: usize = 256 << 10;
/// Time that the peer has to close after the last message.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(3);

/// Subprotocol of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subprotocol {
    /// Numbered channels.
    Channels { version: Version, base64: bool },
    /// SPDY in binary messages.
    Tunnel,
}

impl Subprotocol {
    /// Parses the name of a subprotocol for exec and attach. The empty name is the first version.
    pub(crate) fn of_command(name: &str) -> Option<Self> {
        let (version, base64) = match name {
            "" => (Version::V1, false),
            "base64.channel.k8s.io" => (Version::V1, true),
            "v4.base64.channel.k8s.io" => (Version::V4, true),
            // Versions 2 and 3 exist only for SPDY.
            "v2.channel.k8s.io" | "v3.channel.k8s.io" => return None,
            name => (Version::named(name)?, false),
        };
        Some(Self::Channels { version, base64 })
    }

    /// Parses the name of a subprotocol for port-forward.
    pub(crate) fn of_forward(name: &str) -> Option<Self> {
        let (version, base64) = match name {
            "SPDY/3.1+portforward.k8s.io" => return Some(Self::Tunnel),
            "" | "v4.channel.k8s.io" => (Version::V4, false),
            "v4.base64.channel.k8s.io" => (Version::V4, true),
            _ => return None,
        };
        Some(Self::Channels { version, base64 })
    }
}

/// Wraps an upgraded connection as the server side of a WebSocket.
pub(crate) async fn accept<IO: AsyncRead + AsyncWrite + Unpin>(io: IO) -> WebSocketStream<IO> {
    let config = WebSocketConfig::default()
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(MAX_WRITE_BUFFER_BYTES)
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}
