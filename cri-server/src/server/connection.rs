//! Connection of a client, for tonic: a unix stream whose incoming bytes pass the `Sanitizer`.

use super::authority::Sanitizer;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::{Connected, UdsConnectInfo};

/// Maximum number of bytes per read from the socket.
const READ_CHUNK_BYTES: usize = 16 << 10;

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    sanitizer: Sanitizer,
    /// Sanitized bytes; those from `start` on have not been read by tonic.
    ready: Vec<u8>,
    start: usize,
}

impl Connection {
    /// Wraps an accepted stream.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            sanitizer: Sanitizer::default(),
            ready: Vec::new(),
            start: 0,
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.start == this.ready.len() {
            this.ready.clear();
            this.start = 0;
            let mut chunk = [0; READ_CHUNK_BYTES];
            let mut read = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.sanitizer.feed(read.filled(), &mut this.ready);
        }
        let count = buffer.remaining().min(this.ready.len() - this.start);
        buffer.put_slice(&this.ready[this.start..this.start + count]);
        this.start += count;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, slices)
    }
}
