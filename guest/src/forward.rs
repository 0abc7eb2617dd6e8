//! Port-forward: connects to a port on the VM's loopback and copies bytes both ways, with half-close in both
//! directions.
//!
//! One task per connection copies from client to socket; the stream of replies reads the socket itself, so a slow
//! reader slows the socket. Dropping that stream ends the task and closes the socket.

use crate::status::status;
use boxlite_proto::boxlite::v1::{ErrorKind, PortForwardRequest, PortForwardResponse};
use boxlite_proto::names::MAX_CHUNK_BYTES;
use bytes::BytesMut;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Status, Streaming};

/// Timeout of a dial on the loopback; a listener accepts immediately unless its backlog is full.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads the first message, dials, and returns the stream of replies.
pub(crate) async fn open(
    mut requests: Streaming<PortForwardRequest>,
) -> Result<impl Stream<Item = Result<PortForwardResponse, Status>> + Send + 'static, Status> {
    let first = requests.message().await?.ok_or_else(|| {
        status(
            ErrorKind::InvalidArgument,
            "port",
            "the first message must name the port",
        )
    })?;
    let port = u16::try_from(first.port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| {
            status(
                ErrorKind::InvalidArgument,
                "port",
                format!("port {} is not in 1–65535", first.port),
            )
        })?;
    let socket = dial(port).await?;
    let _ = socket.set_nodelay(true);
    let (reader, mut writer) = socket.into_split();
    let inbound = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut message = Some(first);
        while let Some(request) = message {
            if !request.data.is_empty() && writer.write_all(&request.data).await.is_err() {
                return;
            }
            if request.eof {
                break;
            }
            message = requests.message().await.ok().flatten();
        }
        // Half-close; the other direction continues.
        let _ = writer.shutdown().await;
    }));
    Ok(futures::stream::unfold(
        Some(Outbound {
            reader,
            inbound,
            ended: false,
        }),
        Outbound::next,
    ))
}

/// Dials 127.0.0.1, then ::1, as a server may listen on only one of them.
async fn dial(port: u16) -> Result<TcpStream, Status> {
    let connect = async {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(socket) => Ok(socket),
            Err(first) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
                .await
                .map_err(|_| first),
        }
    };
    let refused = |reason: String| {
        status(
            ErrorKind::NotFound,
            &port.to_string(),
            format!("failed to connect to port {port}: {reason}"),
        )
    };
    match tokio::time::timeout(DIAL_TIMEOUT, connect).await {
        Ok(result) => result.map_err(|error| refused(error.to_string())),
        Err(_) => Err(refused(format!("no answer within {DIAL_TIMEOUT:?}"))),
    }
}

/// The direction from the socket to the client.
struct Outbound {
    reader: OwnedReadHalf,
    inbound: AbortOnDropHandle<()>,
    /// The end of the socket was sent.
    ended: bool,
}

type Item = Result<PortForwardResponse, Status>;

impl Outbound {
    /// Returns the next chunk; `None` after the end or an error.
    async fn next(state: Option<Self>) -> Option<(Item, Option<Self>)> {
        let mut state = state?;
        if state.ended {
            // The client may still be sending; the stream lasts until it ends or disconnects.
            let _ = (&mut state.inbound).await;
            return None;
        }
        let mut buffer = BytesMut::with_capacity(MAX_CHUNK_BYTES);
        match state.reader.read_buf(&mut buffer).await {
            Ok(0) => {
                state.ended = true;
                Some((
                    Ok(PortForwardResponse {
                        data: Default::default(),
                        eof: true,
                    }),
                    Some(state),
                ))
            }
            Ok(_) => Some((
                Ok(PortForwardResponse {
                    data: buffer.freeze(),
                    eof: false,
                }),
                Some(state),
            )),
            Err(error) => Some((
                Err(status(
                    ErrorKind::Internal,
                    "port-forward",
                    error.to_string(),
                )),
                None,
            )),
        }
    }
}
