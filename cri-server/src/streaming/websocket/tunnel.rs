//! A WebSocket as a byte stream, independent of the boundaries of its binary messages.
//!
//! It carries SPDY (`spdy::serve`). The end of the stream is the close message.

use bytes::{Buf, Bytes};
use futures::{Sink, Stream};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Maximum size of a written message.
const MAX_WRITE_BYTES: usize = 32 << 10;

/// A byte stream over a WebSocket.
#[derive(Debug)]
pub(crate) struct Tunnel<IO> {
    socket: WebSocketStream<IO>,
    /// Rest of the message being read.
    message: Bytes,
    /// True once the close message was sent.
    closing: bool,
}

impl<IO> Tunnel<IO> {
    /// Wraps `socket`, whose peer sends first.
    pub(crate) fn new(socket: WebSocketStream<IO>) -> Self {
        Self {
            socket,
            message: Bytes::new(),
            closing: false,
        }
    }
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        error => io::Error::other(error),
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Tunnel<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.message.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_next(context)) {
                Some(Ok(Message::Binary(message))) => self.message = message,
                Some(Ok(Message::Text(_))) => {
                    return Poll::Ready(Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "unexpected text message in byte tunnel",
                    )));
                }
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                // The library answers pings.
                Some(Ok(_)) => {}
                Some(Err(Error::ConnectionClosed)) => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(io_error(error))),
            }
        }
        let length = self.message.len().min(buffer.remaining());
        buffer.put_slice(&self.message[..length]);
        self.message.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tunnel<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(context)).map_err(io_error)?;
        let length = bytes.len().min(MAX_WRITE_BYTES);
        let message = Message::Binary(Bytes::copy_from_slice(&bytes[..length]));
        Pin::new(&mut self.socket)
            .start_send(message)
            .map_err(io_error)?;
        Poll::Ready(Ok(length))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket)
            .poll_flush(context)
            .map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = |error| match error {
            Error::ConnectionClosed | Error::AlreadyClosed => Ok(()),
            error => Err(io_error(error)),
        };
        if !self.closing {
            if let Err(error) = ready!(Pin::new(&mut self.socket).poll_ready(context)) {
                return Poll::Ready(closed(error));
            }
            self.closing = true;
            // Without a code the peer reports an abnormal closure.
            let frame = CloseFrame {
                code: CloseCode::Normal,
                reason: "".into(),
            };
            let message = Message::Close(Some(frame));
            if let Err(error) = Pin::new(&mut self.socket).start_send(message) {
                return Poll::Ready(closed(error));
            }
        }
        match ready!(Pin::new(&mut self.socket).poll_flush(context)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(closed(error)),
        }
    }
}
