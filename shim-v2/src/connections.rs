//! [`Connections`]: counts the connections to the shim's socket, so that the shim exits after its clients have disconnected.
//!
//! A Go ttrpc client that receives a response and the end of the connection together may report either: containerd's
//! RemovePodSandbox then fails with "ttrpc: closed" although ShutdownSandbox succeeded. A client closes its end after it has
//! read the response, and the daemon exits after that.

use containerd_shim_protos::ttrpc::asynchronous::transport::Listener;
use std::io;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// The open connections.
#[derive(Default)]
pub struct Connections {
    open: TaskTracker,
}

impl Connections {
    /// Wraps `listener` so that its connections are counted.
    ///
    /// # Errors
    /// The descriptor cannot be polled.
    pub fn listener(&self, listener: UnixListener) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        let accepted = UnixListenerStream::new(tokio::net::UnixListener::from_std(listener)?);
        let open = self.open.clone();
        Ok(Listener::new(accepted.map(move |stream| {
            stream.map(|stream| Counted {
                stream,
                _open: open.token(),
            })
        })))
    }

    /// Waits until every client has disconnected. Returns false if that takes longer than `timeout`.
    pub async fn wait_closed(&self, timeout: Duration) -> bool {
        self.open.close();
        tokio::time::timeout(timeout, self.open.wait())
            .await
            .is_ok()
    }
}

/// A counted connection.
struct Counted {
    stream: UnixStream,
    _open: TaskTrackerToken,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn wait_closed_waits_for_clients_up_to_timeout() {
        const SHORT: Duration = Duration::from_millis(50);
        const LONG: Duration = Duration::from_secs(10);
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("s");
        let connections = Connections::default();
        let mut listener = connections
            .listener(UnixListener::bind(&path).expect("binds"))
            .expect("listens");
        assert!(connections.wait_closed(SHORT).await, "no client connected");

        let mut client = UnixStream::connect(&path).await.expect("connects");
        let mut served = listener.next().await.expect("one").expect("accepted");
        let server = tokio::spawn(async move {
            served.write_all(b"answer").await.expect("writes");
            let mut rest = Vec::new();
            served.read_to_end(&mut rest).await.expect("reads");
            rest
        });
        let mut answer = [0; 6];
        client.read_exact(&mut answer).await.expect("reads");
        assert_eq!(&answer, b"answer");
        assert!(!connections.wait_closed(SHORT).await, "client is connected");
        client.write_all(b"bye").await.expect("writes");
        drop(client);
        assert!(
            connections.wait_closed(LONG).await,
            "client has disconnected"
        );
        assert_eq!(server.await.expect("served"), b"bye");
    }
}
