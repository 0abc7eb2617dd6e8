//! SPDY/3.1 as Kubernetes speaks it: framing (`frame`, `headers`, `dictionary`) and connections (`connection`).
//!
//! The server's half only, over any byte stream: TCP after an upgrade, or a WebSocket that tunnels it. What the streams
//! carry is decided by `streaming::remote` (exec, attach) and `streaming::forward` (port-forward).

mod connection;
mod dictionary;
mod frame;
mod headers;
#[cfg(test)]
mod tests;

pub use connection::{Accept, Stream, StreamOutput, serve};

/// Why a connection ended badly.
#[derive(Debug, thiserror::Error)]
pub enum SpdyError {
    /// The byte stream.
    #[error("the connection broke")]
    Io(#[source] std::io::Error),
    /// What is no frame within the limits.
    #[error("bad SPDY frame: {0}")]
    Frame(&'static str),
    /// What is no header block within the limits.
    #[error("bad SPDY header block: {0}")]
    Headers(&'static str),
}
