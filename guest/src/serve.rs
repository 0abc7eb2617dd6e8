//! Serves the guest protocol on vsock port 2695, reports readiness on host port 2696, and returns when the VM is to
//! power off.
//!
//! libkrun's vsock bridge loses bytes on a short write, so HTTP/2 windows are limited to [`names::GUEST_WINDOW_BYTES`] and
//! connections are few; message limits are those of `boxlite_proto::names`.

use crate::agent::Agent;
use crate::boot::reaper::Reaper;
use crate::services;
use crate::spawner::Spawner;
use boxlite_proto::names;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, BufWriter, ReadBuf};
use tokio_stream::{Stream, StreamExt};
use tokio_util::task::AbortOnDropHandle;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;
use tonic::transport::server::Connected;

/// Initial delay before the readiness call is retried; doubled up to [`MAX_READY_DELAY`].
const INITIAL_READY_DELAY: Duration = Duration::from_millis(10);
/// Maximum delay between two readiness calls.
const MAX_READY_DELAY: Duration = Duration::from_millis(500);
/// Maximum number of readiness calls, about one minute. After that the host is assumed to need none; it can still
/// connect.
const READY_ATTEMPTS: u32 = 120;
/// Timeout of one readiness call.
const READY_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum size of HTTP/2 frames in bytes; the smallest the protocol allows.
const MAX_FRAME_BYTES: u32 = 16 << 10;
/// Maximum number of streams per connection; every log follower, exec and port-forward uses one or two.
const MAX_STREAMS: u32 = 512;

/// Delay between the reply to Shutdown and the end of the VM.
const SHUTDOWN_DELAY: Duration = Duration::from_millis(20);

/// Timeout for the tasks of containers to end before the VM powers off.
const TASK_SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(100);

/// Errors that end the agent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// The handler of SIGCHLD could not be installed.
    #[error("failed to catch SIGCHLD")]
    Signals(#[source] io::Error),
    /// The vsock port could not be bound.
    #[error("failed to listen on vsock port {port}")]
    Listen {
        port: u32,
        #[source]
        source: io::Error,
    },
    /// The spawner exited, so no process can be created.
    #[error("spawner exited")]
    SpawnerGone,
    /// The gRPC server failed.
    #[error("failed to run the gRPC server")]
    Server(#[from] tonic::transport::Error),
}

/// Runs the agent. Returns after `Guest.Shutdown`.
pub(crate) async fn serve(spawner: Spawner) -> Result<(), ServeError> {
    let children = Reaper::subscribe().map_err(ServeError::Signals)?;
    let agent = Arc::new(Agent::new(spawner));
    let _reaping = AbortOnDropHandle::new(tokio::spawn({
        let agent = Arc::clone(&agent);
        async move { agent.launcher().reaper.run(children).await }
    }));

    let launcher = agent.launcher();
    let spawner_gone = launcher.reaper.register(launcher.spawner.pid);

    let address = VsockAddr::new(VMADDR_CID_ANY, names::GUEST_PORT);
    let listener = VsockListener::bind(address).map_err(|source| ServeError::Listen {
        port: names::GUEST_PORT,
        source,
    })?;
    let _ready = AbortOnDropHandle::new(tokio::spawn(report_ready()));

    let server = Server::builder()
        .initial_stream_window_size(names::GUEST_WINDOW_BYTES)
        .initial_connection_window_size(names::GUEST_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .add_routes(services::routes(&agent))
        .serve_with_incoming(connections(listener));
    tokio::select! {
        result = server => result.map_err(ServeError::from),
        () = agent.shut_down() => {
            // Lets the reply leave the VM.
            tokio::time::sleep(SHUTDOWN_DELAY).await;
            let tasks = &agent.launcher().tasks;
            tasks.close();
            // The containers have been deleted, so their tasks are ending.
            if tokio::time::timeout(TASK_SHUTDOWN_TIMEOUT, tasks.wait()).await.is_err() {
                tracing::info!(remaining = tasks.len(), "timed out waiting for tasks to end");
            }
            Ok(())
        }
        _ = spawner_gone => Err(ServeError::SpawnerGone),
    }
}

/// Connects once to the host's readiness port and closes the connection. The host accepts one connection and reads
/// nothing.
async fn report_ready() {
    let mut pause = INITIAL_READY_DELAY;
    for attempt in 1..=READY_ATTEMPTS {
        let call = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, names::READY_PORT));
        match tokio::time::timeout(READY_TIMEOUT, call).await {
            Ok(Ok(_)) => {
                crate::steps::agent_ready();
                return;
            }
            Ok(Err(error)) if attempt == READY_ATTEMPTS => {
                tracing::warn!(%error, "failed to report readiness to the host")
            }
            _ => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(MAX_READY_DELAY);
    }
}

/// Returns incoming connections. A failed accept (the peer may have left) does not end the stream.
fn connections(listener: VsockListener) -> impl Stream<Item = io::Result<Connection>> {
    listener.incoming().filter_map(|accepted| match accepted {
        Ok(stream) => Some(Ok(Connection(BufWriter::with_capacity(
            WRITE_BUFFER_BYTES,
            stream,
        )))),
        Err(error) => {
            tracing::warn!(%error, "failed to accept a vsock connection");
            None
        }
    })
}

/// Size of the write buffer, in bytes. h2 writes a frame's header and payload separately, and each write to a vsock
/// is a packet that notifies the host. Sized for one flow-control window; h2 flushes when it has no more to send.
const WRITE_BUFFER_BYTES: usize = names::GUEST_WINDOW_BYTES as usize;

/// A vsock stream for tonic. All peers are the host, so there is no connection info.
struct Connection(BufWriter<VsockStream>);

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
