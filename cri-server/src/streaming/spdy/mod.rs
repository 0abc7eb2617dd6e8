//! SPDY/3.1 as used by Kubernetes: framing (`frame`, `headers`, `dictionary`) and connections (`connection`).
//!
//! Only the server side, over any byte stream: TCP after an upgrade, or a WebSocket tunnel. The streams are used by
//! `streaming::remote` (exec, attach) and `streaming::forward` (port-forward).

mod connection;
mod dictionary;
mod frame;
mod headers;
#[cfg(test)]
mod tests;

pub(crate) use connection::{Accept, Stream, StreamOutput, serve};

/// Failure of a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpdyError {
    /// The byte stream failed.
    #[error("failed to use the connection")]
    Io(#[source] std::io::Error),
    /// Invalid frame, or one that exceeds the limits.
    #[error("invalid SPDY frame: {0}")]
    Frame(&'static str),
    /// Invalid header block, or one that exceeds the limits.
    #[error("invalid SPDY header block: {0}")]
    Headers(&'static str),
}
