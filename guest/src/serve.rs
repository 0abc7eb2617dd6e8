//! Serves the guest protocol on vsock 2695, says ready on host port 2696, and ends when the VM is to power off.
//!
//! The vsock bridge of libkrun loses bytes on a short write, so HTTP/2 windows stay at [`names::GUEST_WINDOW`] and
//! connections few; the limits of messages are those of `boxlite_proto::names`.

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
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;
use tonic::transport::server::Connected;

/// First pause before the ready call is tried again; doubled up to [`READY_PAUSE_LIMIT`].
const READY_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause between two ready calls.
const READY_PAUSE_LIMIT: Duration = Duration::from_millis(500);
/// How often the ready call is tried: about a minute. After that the host is taken to need none; it may still connect.
const READY_ATTEMPTS: u32 = 120;
/// Longest one ready call may take.
const READY_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest HTTP/2 frame the agent sends or takes, in bytes; the protocol's smallest.
const FRAME_LIMIT: u32 = 16 << 10;
/// Streams per connection: every follower of a log, every exec and every port-forward holds one or two.
const STREAM_LIMIT: u32 = 512;

/// Between the answer to Shutdown and the end of the VM.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// What the agent cannot go on without.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// SIGCHLD could not be caught.
    #[error("catch SIGCHLD")]
    Signals(#[source] io::Error),
    /// The vsock port could not be listened on.
    #[error("listen on vsock port {port}")]
    Listen {
        port: u32,
        #[source]
        source: io::Error,
    },
    /// No process can be made any more.
    #[error("the spawner ended")]
    SpawnerGone,
    /// The gRPC server broke.
    #[error("gRPC server")]
    Server(#[from] tonic::transport::Error),
}

/// Runs the agent. Returns when `Guest.Shutdown` was carried out.
pub async fn serve(spawner: Spawner) -> Result<(), ServeError> {
    let children = Reaper::subscribe().map_err(ServeError::Signals)?;
    let agent = Arc::new(Agent::new(spawner));
    let reaping = tokio::spawn({
        let agent = Arc::clone(&agent);
        async move { agent.reaper.run(children).await }
    });

    let spawner_gone = agent.reaper.register(agent.spawner.pid);

    let address = VsockAddr::new(VMADDR_CID_ANY, names::GUEST_PORT);
    let listener = VsockListener::bind(address).map_err(|source| ServeError::Listen {
        port: names::GUEST_PORT,
        source,
    })?;
    let ready = tokio::spawn(say_ready());

    let server = Server::builder()
        .initial_stream_window_size(names::GUEST_WINDOW)
        .initial_connection_window_size(names::GUEST_WINDOW)
        .max_frame_size(FRAME_LIMIT)
        .max_concurrent_streams(STREAM_LIMIT)
        .add_routes(services::routes(&agent))
        .serve_with_incoming(connections(listener));
    let result = tokio::select! {
        result = server => result.map_err(ServeError::from),
        () = agent.shut_down() => {
            // Time for the answer to leave.
            tokio::time::sleep(LAST_WORDS).await;
            Ok(())
        }
        _ = spawner_gone => Err(ServeError::SpawnerGone),
    };
    ready.abort();
    reaping.abort();
    result
}

/// Connects once to the host's ready port and closes. The host accepts once and reads nothing.
async fn say_ready() {
    let mut pause = READY_PAUSE;
    for attempt in 1..=READY_ATTEMPTS {
        let call = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, names::READY_PORT));
        match tokio::time::timeout(READY_TIMEOUT, call).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) if attempt == READY_ATTEMPTS => {
                tracing::warn!(%error, "nobody took the ready call")
            }
            _ => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(READY_PAUSE_LIMIT);
    }
}

/// Incoming connections; a failed accept (a peer that left at once) is no reason to stop.
fn connections(listener: VsockListener) -> impl Stream<Item = io::Result<Connection>> {
    listener.incoming().filter_map(|accepted| match accepted {
        Ok(stream) => Some(Ok(Connection(BufWriter::with_capacity(
            WRITE_BUFFER,
            stream,
        )))),
        Err(error) => {
            tracing::warn!(%error, "vsock accept");
            None
        }
    })
}

/// Bytes gathered before they go to the socket: h2 writes a frame's head and its payload apart, and each write to a vsock
/// is a packet of its own with a kick of the host. Sized for what one window lets through; h2 flushes when it has no more.
const WRITE_BUFFER: usize = names::GUEST_WINDOW as usize;

/// A vsock stream as tonic wants it. There is one peer, the host: nothing about it is worth knowing.
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
