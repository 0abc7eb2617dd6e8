//! Port-forward: dials a port on the VM's loopback and carries bytes both ways, with half-close kept both ways.
//!
//! One task per forward copies client → socket; the answering stream reads the socket itself, so a slow reader slows the
//! socket. Dropping the answering stream ends the task and closes the socket.

use crate::status::status;
use boxlite_proto::boxlite::v1::{ErrorKind, PortForwardRequest, PortForwardResponse};
use boxlite_proto::names::CHUNK_LIMIT;
use bytes::BytesMut;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::task::JoinHandle;
use tokio_stream::Stream;
use tonic::{Status, Streaming};

/// Longest time a dial on the loopback may take; a listener answers at once or its backlog is full.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads the first message, dials, and returns the answering stream.
pub async fn open(
    mut requests: Streaming<PortForwardRequest>,
) -> Result<impl Stream<Item = Result<PortForwardResponse, Status>> + Send + 'static, Status> {
    let first = requests.message().await?.ok_or_else(|| {
        status(
            ErrorKind::InvalidArgument,
            "port",
            "the first message names the port",
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
    let inbound = tokio::spawn(async move {
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
        // Half-close; the other direction goes on.
        let _ = writer.shutdown().await;
    });
    Ok(futures::stream::unfold(
        Some(Outbound {
            reader,
            inbound: AbortOnDrop(inbound),
            ended: false,
        }),
        Outbound::next,
    ))
}

/// 127.0.0.1 first, then ::1, as a server may listen on one of them only.
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
            format!("dial port {port}: {reason}"),
        )
    };
    match tokio::time::timeout(DIAL_TIMEOUT, connect).await {
        Ok(result) => result.map_err(|error| refused(error.to_string())),
        Err(_) => Err(refused(format!("no answer within {DIAL_TIMEOUT:?}"))),
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The direction from the socket to the client.
struct Outbound {
    reader: OwnedReadHalf,
    inbound: AbortOnDrop,
    /// The socket's end was passed on.
    ended: bool,
}

type Item = Result<PortForwardResponse, Status>;

impl Outbound {
    /// The next chunk; after the end, or an error, nothing more.
    async fn next(state: Option<Self>) -> Option<(Item, Option<Self>)> {
        let mut state = state?;
        if state.ended {
            // The client may still be sending: the stream lasts until it ends, too, or goes away.
            let _ = (&mut state.inbound.0).await;
            return None;
        }
        let mut buffer = BytesMut::with_capacity(CHUNK_LIMIT);
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
