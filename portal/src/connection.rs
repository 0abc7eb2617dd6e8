//! [`Connection`]: a lazy HTTP/2 channel to the agent of one VM, and the agent's address ([`GuestAddress`]).
//!
//! The first call dials; a broken channel is redialed by the next call. Callers retry calls themselves
//! (`interfaces::follow` does so for output).

use super::error::PortalError;
use super::severable::{Severable, vm_gone};
use boxlite_proto::names;
use boxlite_sys::unix_socket;
use hyper_util::rt::TokioIo;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Uri};

/// Time limit for the unix connect and the hybrid greeting together. The peer is a process of this host, which answers
/// within a second even under emulation on a busy machine.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of HTTP/2 pings during a call. Detects a dead peer behind a silent vsock bridge.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Time limit for the answer to a ping. Long, since an emulated guest under load answers late.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(45);
/// Maximum size of the hybrid greeting, "OK <port>\n", in bytes.
const MAX_GREETING_BYTES: usize = 32;
/// HTTP/2 window of one stream of a shared connection, in bytes: a fraction of the connection's window, so that a stream
/// whose reader pauses does not block the others. The single stream of a dedicated connection has the whole window:
/// output moves one window per round trip, which determines its cost on an emulated guest.
const SHARED_STREAM_WINDOW_BYTES: u32 = names::GUEST_WINDOW_BYTES / 4;
/// Maximum size of a header list from the guest, in bytes.
const MAX_HEADER_BYTES: u32 = 16 << 10;

/// Address of an agent on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestAddress {
    /// A unix socket on which every connection reaches the agent (libkrun).
    Direct(PathBuf),
    /// A unix socket that speaks Firecracker's hybrid vsock: `CONNECT <port>\n`, then `OK <number>\n`
    /// (vhost-device-vsock).
    Hybrid {
        /// Path of the unix socket.
        path: PathBuf,
        /// vsock port in the guest.
        port: u32,
    },
}

impl GuestAddress {
    /// Returns the address of the agent in a VM of `kind` whose socket is `path`: libkrun maps one vsock port to the
    /// socket, vhost-device-vsock (QEMU) speaks hybrid vsock.
    pub fn of(kind: &boxlite_proto::vmm::VmmKind, path: PathBuf) -> Self {
        match kind {
            boxlite_proto::vmm::VmmKind::Krun => Self::Direct(path),
            boxlite_proto::vmm::VmmKind::Qemu => Self::Hybrid {
                path,
                port: names::GUEST_PORT,
            },
        }
    }

    /// The unix socket.
    pub fn path(&self) -> &Path {
        match self {
            Self::Direct(path) | Self::Hybrid { path, .. } => path,
        }
    }

    /// Connects and, on a hybrid socket, performs the greeting. Dropping the future closes the socket.
    ///
    /// # Errors
    /// Those of connect(2); `TimedOut` after [`CONNECT_TIMEOUT`]; `InvalidData` on a wrong greeting.
    pub async fn connect(&self) -> io::Result<UnixStream> {
        tokio::time::timeout(CONNECT_TIMEOUT, self.connect_unbounded())
            .await
            .unwrap_or_else(|_| {
                Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "{} did not answer within {CONNECT_TIMEOUT:?}",
                        self.path().display()
                    ),
                ))
            })
    }

    async fn connect_unbounded(&self) -> io::Result<UnixStream> {
        let mut stream = unix_socket::connect(self.path()).await?;
        if let Self::Hybrid { port, .. } = self {
            stream
                .write_all(format!("CONNECT {port}\n").as_bytes())
                .await?;
            read_greeting(&mut stream).await?;
        }
        Ok(stream)
    }
}

/// Reads "OK <number>\n" byte by byte, since the following bytes belong to HTTP/2.
async fn read_greeting(stream: &mut UnixStream) -> io::Result<()> {
    let mut line = Vec::with_capacity(MAX_GREETING_BYTES);
    loop {
        let byte = match stream.read_u8().await {
            Ok(byte) => byte,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the vsock bridge closed the connection: the agent does not listen",
                ));
            }
            Err(error) => return Err(error),
        };
        if byte == b'\n' {
            break;
        }
        line.push(byte);
        if line.len() > MAX_GREETING_BYTES {
            break;
        }
    }
    let number = line
        .strip_prefix(b"OK ")
        .filter(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit));
    match number {
        Some(_) => Ok(()),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "vsock greeting {:?} is not \"OK <port>\"",
                String::from_utf8_lossy(&line)
            ),
        )),
    }
}

/// A lazy channel to an agent. Clones share the channel.
#[derive(Debug, Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    address: GuestAddress,
    stream_window: u32,
    channel: OnceLock<Channel>,
    /// Shared with the dedicated connections.
    severed: CancellationToken,
}

impl Connection {
    /// Creates a connection that dials at the first call.
    pub fn lazy(address: GuestAddress) -> Self {
        Self::with_window(
            address,
            SHARED_STREAM_WINDOW_BYTES,
            CancellationToken::new(),
        )
    }

    fn with_window(address: GuestAddress, stream_window: u32, severed: CancellationToken) -> Self {
        Self {
            inner: Arc::new(Inner {
                address,
                stream_window,
                channel: OnceLock::new(),
                severed,
            }),
        }
    }

    /// Creates a second connection to the same agent. All streams of an HTTP/2 connection share one flow-control window,
    /// so a stream whose reader may stall needs a separate connection, or it stalls every other call.
    pub fn dedicated(&self) -> Self {
        Self::with_window(
            self.inner.address.clone(),
            names::GUEST_WINDOW_BYTES,
            self.inner.severed.clone(),
        )
    }

    /// Returns the address.
    pub fn address(&self) -> &GuestAddress {
        &self.inner.address
    }

    /// Returns the channel, which is created at the first call, within a tokio runtime.
    pub(super) fn channel(&self) -> Channel {
        self.inner
            .channel
            .get_or_init(|| open_channel(&self.inner))
            .clone()
    }

    /// Fails all calls of this connection and its dedicated connections, present and future.
    pub(super) fn sever(&self) {
        self.inner.severed.cancel();
    }

    /// Returns true after [`Self::sever`].
    pub(super) fn is_severed(&self) -> bool {
        self.inner.severed.is_cancelled()
    }

    /// Waits for [`Self::sever`].
    pub(super) async fn severed(&self) {
        self.inner.severed.cancelled().await;
    }

    /// Connects once to check that the agent listens, and closes the connection.
    ///
    /// # Errors
    /// [`PortalError::Connect`].
    pub async fn probe(&self) -> Result<(), PortalError> {
        let address = self.address();
        address
            .connect()
            .await
            .map(drop)
            .map_err(|source| PortalError::Connect {
                path: address.path().to_owned(),
                source,
            })
    }
}

fn open_channel(connection: &Inner) -> Channel {
    let (address, severed) = (connection.address.clone(), connection.severed.clone());
    // The URI only sets `:authority`; the connector below ignores it.
    Endpoint::from_static("http://boxlite-guest")
        .initial_stream_window_size(connection.stream_window)
        .initial_connection_window_size(names::GUEST_WINDOW_BYTES)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(false)
        .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let (address, severed) = (address.clone(), severed.clone());
            async move {
                let stream = severed
                    .run_until_cancelled(address.connect())
                    .await
                    .unwrap_or_else(|| Err(vm_gone()))?;
                Ok::<_, io::Error>(TokioIo::new(Severable::new(stream, severed)))
            }
        }))
}

#[cfg(test)]
mod tests;
