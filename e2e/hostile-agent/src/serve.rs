//! Reports readiness, then serves the guest protocol or attacks each connection, as [`Boot`] says.

use crate::attack::Containers;
use crate::boot::Boot;
use crate::container::ContainerService;
use crate::execution::ExecutionService;
use crate::guest::GuestService;
use crate::mounts::MountsService;
use boxlite_proto::boxlite::v1::container_server::ContainerServer;
use boxlite_proto::boxlite::v1::execution_server::ExecutionServer;
use boxlite_proto::boxlite::v1::guest_server::GuestServer;
use boxlite_proto::boxlite::v1::mounts_server::MountsServer;
use boxlite_proto::names;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio_stream::StreamExt;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use tonic::transport::Server;
use tonic::transport::server::Connected;

/// Interval between two attempts to report readiness.
const READY_INTERVAL: Duration = Duration::from_millis(50);
/// Number of streams that the host may open: any.
const MAX_STREAMS: u32 = u32::MAX;
/// An empty SETTINGS frame.
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
/// A PING frame, which the host must answer.
const PING: &[u8] = &[0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

/// Serves without end.
pub(crate) async fn serve(boot: Boot) {
    let address = VsockAddr::new(VMADDR_CID_ANY, names::GUEST_PORT);
    let listener = VsockListener::bind(address).expect("failed to listen");
    let _ready = tokio::spawn(report_ready());
    let incoming = listener.incoming();
    if boot == Boot::Serve {
        let containers = Arc::new(Containers::new());
        let connections = incoming.map(|stream| stream.map(Connection));
        let served = Server::builder()
            .max_concurrent_streams(MAX_STREAMS)
            .add_service(GuestServer::new(GuestService(Arc::clone(&containers))))
            .add_service(ContainerServer::new(ContainerService(Arc::clone(
                &containers,
            ))))
            .add_service(ExecutionServer::new(ExecutionService(Arc::clone(
                &containers,
            ))))
            .add_service(MountsServer::new(MountsService(containers)))
            .serve_with_incoming(connections);
        served.await.expect("failed to serve");
        return;
    }
    tokio::pin!(incoming);
    while let Some(accepted) = incoming.next().await {
        if let Ok(stream) = accepted {
            tokio::spawn(attack(boot, stream));
        }
    }
}

async fn report_ready() {
    let address = VsockAddr::new(VMADDR_CID_HOST, names::READY_PORT);
    while VsockStream::connect(address).await.is_err() {
        tokio::time::sleep(READY_INTERVAL).await;
    }
}

/// Attacks one connection until the host closes it.
async fn attack(boot: Boot, mut stream: VsockStream) {
    let noise: Vec<u8> = (0..65536_u32).map(|n| ((n * n) >> 3) as u8).collect();
    let (once, again): (&[u8], Vec<u8>) = match boot {
        Boot::Noise => (&[], noise),
        Boot::Pings => (SETTINGS, PING.repeat(4096)),
        Boot::Silent | Boot::Serve => return std::future::pending().await,
    };
    let mut sent = stream.write_all(once).await;
    // Nothing is read: answers of the host pile up at its end.
    while sent.is_ok() {
        sent = stream.write_all(&again).await;
    }
}

/// A connection for tonic, without information about the peer.
struct Connection(VsockStream);

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
