//! [`Severable`]: a connection's byte stream that fails once its VM is known to be gone.
//!
//! Only forwards bytes. The owner of the session decides that a VM is gone and calls
//! [`sever`](crate::GuestSession::sever); a peer that still holds its end of the socket does not delay the callers then.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// A stream whose reads and writes fail with `ConnectionReset` once its token is cancelled.
pub(super) struct Severable {
    stream: UnixStream,
    severed: Pin<Box<WaitForCancellationFutureOwned>>,
    token: CancellationToken,
}

impl Severable {
    /// Wraps a connected stream.
    pub(super) fn new(stream: UnixStream, token: CancellationToken) -> Self {
        Self {
            stream,
            severed: Box::pin(token.clone().cancelled_owned()),
            token,
        }
    }

    fn check(&self) -> io::Result<()> {
        match self.token.is_cancelled() {
            true => Err(vm_gone()),
            false => Ok(()),
        }
    }
}

/// Returns the error of every use of a severed connection.
pub(super) fn vm_gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the VM has ended")
}

impl AsyncRead for Severable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // An HTTP/2 connection always has a read pending, which this wakes.
        if self.severed.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(vm_gone()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Severable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check()?;
        Pin::new(&mut self.stream).poll_write_vectored(context, data)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
