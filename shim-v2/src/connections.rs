//! [`Connections`]: who is connected to the shim's socket, counted, so that its end can wait until the clients have gone.
//!
//! A Go client of ttrpc that reads an answer and the end of the connection at once takes either: containerd's
//! RemovePodSandbox then fails with "ttrpc: closed" though ShutdownSandbox was answered. Who asked closes its end when it has
//! read the answer; the daemon ends after that. Reads and writes nothing itself.

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

/// See the module.
#[derive(Default)]
pub struct Connections {
    open: TaskTracker,
}

impl Connections {
    /// The server's side of `listener`, every connection of which is counted.
    ///
    /// # Errors
    /// A descriptor that cannot be polled.
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

    /// Waits until every client has closed, at most `limit`; whether all have.
    pub async fn left_by_clients(&self, limit: Duration) -> bool {
        self.open.close();
        tokio::time::timeout(limit, self.open.wait()).await.is_ok()
    }
}

/// One connection.
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
    async fn the_end_waits_for_clients_and_not_for_ever() {
        const SHORT: Duration = Duration::from_millis(50);
        const LONG: Duration = Duration::from_secs(10);
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("s");
        let connections = Connections::default();
        let mut listener = connections
            .listener(UnixListener::bind(&path).expect("binds"))
            .expect("listens");
        assert!(connections.left_by_clients(SHORT).await, "nobody came");

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
        assert!(!connections.left_by_clients(SHORT).await, "it is there");
        client.write_all(b"bye").await.expect("writes");
        drop(client);
        assert!(connections.left_by_clients(LONG).await, "it has gone");
        assert_eq!(server.await.expect("served"), b"bye");
    }
}
