//! TCP ports of a pod in the host's network: listeners on either side are reachable from the other.
//!
//! The host reports its listening TCP ports; the agent listens on the same ports on the loopback and forwards each
//! connection to the host through the slirp NIC. In turn the agent reports the ports the pod's processes listen on,
//! and the host forwards connections to them with `Guest.PortForward`. For TCP, `localhost` is therefore the node's,
//! and a port in use on one side is in use on both. A port of the node that has no listener (a hostPort) is reached, too,
//! and the node's addresses can be bound by clients ([`addresses`]).
//!
//! If the guest's sockets already are the host's (TSI), nothing is forwarded: the agent listens on an address that
//! receives no connections, so that the pod's socket table shows the host's ports ([`plain`]).
//!
//! Called by `Guest.HostPorts`; everything ends when that stream is dropped.

mod addresses;
mod plain;

use crate::status::status;
use boxlite_proto::boxlite::v1::{ErrorKind, HostPortsRequest, HostPortsResponse, ListeningPort};
use boxlite_sys::report::Report;
use boxlite_sys::tcp_table::listening_sockets;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_stream::Stream;
use tonic::{Status, Streaming};

/// Interval between checks of the pod's listeners, and thus the delay until a port is reachable from the host. A
/// check takes well under a millisecond, even when emulated.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
/// Timeout of a dial to the host.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of concurrent connections to the host; further ones wait in the listeners' backlogs.
const MAX_CONNECTIONS: usize = 512;
/// Maximum number of mirrored host ports; a node has a few dozen.
const MAX_PORTS: usize = 1024;

/// Reads the first message, listens on its ports, and returns the stream of replies: the pod's current ports, then
/// one item per change.
pub(crate) async fn open(
    mut requests: Streaming<HostPortsRequest>,
) -> Result<impl Stream<Item = Result<HostPortsResponse, Status>> + Send + 'static, Status> {
    let first = requests
        .message()
        .await?
        .ok_or_else(|| invalid("gateway", "the first message must name the gateway".into()))?;
    let mode = match first.gateway.as_str() {
        "" => ListenerMode::Visible(plain::pool()),
        text => ListenerMode::Forwarded(
            text.parse()
                .map_err(|_| invalid("gateway", format!("{text:?} is not an IPv4 address")))?,
        ),
    };
    let mut looks = interval(CHECK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut exchange = Exchange {
        requests,
        looks,
        listeners: PortListeners::new(mode),
        addresses: Vec::new(),
        sent: None,
    };
    exchange.apply_request(&first).await;
    Ok(futures::stream::unfold(Some(exchange), Exchange::step))
}

fn invalid(field: &str, message: String) -> Status {
    status(ErrorKind::InvalidArgument, field, message)
}

/// Treatment of connections to a mirrored port.
#[derive(Clone, Copy)]
enum ListenerMode {
    /// Accepts connections to the loopback and forwards them to this address.
    Forwarded(Ipv4Addr),
    /// Only makes the port visible in the socket table.
    Visible(&'static plain::Pool),
}

impl ListenerMode {
    async fn listen(self, port: u16) -> std::io::Result<TcpListener> {
        match self {
            Self::Forwarded(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await,
            Self::Visible(pool) => TcpListener::from_std(pool.listen(port)?),
        }
    }
}

struct Exchange {
    requests: Streaming<HostPortsRequest>,
    looks: Interval,
    listeners: PortListeners,
    /// The node's addresses; empty if the pod is not in the host's network.
    addresses: Vec<Ipv4Addr>,
    /// The list last sent.
    sent: Option<Vec<ListeningPort>>,
}

type Item = Result<HostPortsResponse, Status>;

impl Exchange {
    async fn step(exchange: Option<Self>) -> Option<(Item, Option<Self>)> {
        let mut exchange = exchange?;
        match exchange.next().await {
            Ok(Some(answer)) => Some((Ok(answer), Some(exchange))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    }

    async fn apply_request(&mut self, request: &HostPortsRequest) {
        let parsed = request.addresses.iter().map(|text| text.parse());
        // An address of another family cannot be used here.
        let addresses: Vec<Ipv4Addr> = parsed.filter_map(Result::ok).collect();
        if addresses != self.addresses {
            let gateway = match self.listeners.mode {
                ListenerMode::Forwarded(gateway) => Some(gateway),
                ListenerMode::Visible(_) => None,
            };
            if let Err(error) = addresses::apply(&addresses, gateway) {
                let error = Report(&error);
                tracing::warn!(%error, "failed to make the node's addresses available");
            }
            self.addresses = addresses;
        }
        self.listeners.set(&request.ports).await;
    }

    /// Returns the next reply, or `None` after the host has closed its side.
    async fn next(&mut self) -> Result<Option<HostPortsResponse>, Status> {
        loop {
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.apply_request(&request).await,
                    None => return Ok(None),
                },
                _ = self.looks.tick() => {
                    let ports = self.own_ports();
                    if self.sent.as_ref() != Some(&ports) {
                        self.sent = Some(ports.clone());
                        return Ok(Some(HostPortsResponse { ports }));
                    }
                    // A host port that was in use here may be free now.
                    self.listeners.retry().await;
                }
            }
        }
    }

    /// Returns the ports the pod's processes listen on, excluding listeners.
    fn own_ports(&self) -> Vec<ListeningPort> {
        let mut found = BTreeMap::new();
        for socket in listening_sockets() {
            if !self.listeners.has(socket.port) {
                // Reachable from outside if at least one of its sockets is.
                let only_loopback = found.entry(socket.port).or_insert(true);
                *only_loopback &= socket.loopback;
            }
        }
        found
            .into_iter()
            .map(|(port, loopback)| ListeningPort {
                port: port.into(),
                loopback,
            })
            .collect()
    }
}

/// Listeners on the host's ports. Dropping it closes them and their connections.
struct PortListeners {
    mode: ListenerMode,
    wanted: BTreeSet<u16>,
    listening: HashMap<u16, AbortHandle>,
    tasks: JoinSet<()>,
    connections: Arc<Semaphore>,
}

impl PortListeners {
    fn new(mode: ListenerMode) -> Self {
        Self {
            mode,
            wanted: BTreeSet::new(),
            listening: HashMap::new(),
            tasks: JoinSet::new(),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        }
    }

    fn has(&self, port: u16) -> bool {
        self.listening.contains_key(&port)
    }

    /// Listens on exactly these ports.
    async fn set(&mut self, ports: &[u32]) {
        self.wanted = ports
            .iter()
            .filter_map(|port| u16::try_from(*port).ok().filter(|port| *port != 0))
            .take(MAX_PORTS)
            .collect();
        let wanted = &self.wanted;
        self.listening.retain(|port, task| {
            let keep = wanted.contains(port);
            if !keep {
                task.abort();
            }
            keep
        });
        self.retry().await;
    }

    /// Retries ports that could not be bound because a process of the pod may have had them.
    async fn retry(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        for &port in &self.wanted {
            if self.listening.contains_key(&port) {
                continue;
            }
            let Ok(listener) = self.mode.listen(port).await else {
                continue;
            };
            let to = match self.mode {
                ListenerMode::Forwarded(gateway) => Some((gateway.into(), port)),
                ListenerMode::Visible(_) => None,
            };
            let task = self
                .tasks
                .spawn(accept(listener, to, Arc::clone(&self.connections)));
            self.listening.insert(port, task);
        }
    }
}

/// Accepts connections until the task is aborted, which also closes them. Connections without a target are closed.
async fn accept(listener: TcpListener, to: Option<(IpAddr, u16)>, connections: Arc<Semaphore>) {
    let mut open = JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((inside, _)) => {
                open.spawn(async move {
                    if let Some(to) = to {
                        carry(inside, to).await;
                    }
                    drop(permit);
                });
            }
            // Out of descriptors: open connections must end first.
            Err(_) => tokio::time::sleep(CHECK_INTERVAL).await,
        }
    }
}

async fn carry(mut inside: TcpStream, to: (IpAddr, u16)) {
    let dialled = tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect(to)).await;
    let Ok(Ok(mut outside)) = dialled else {
        // The client sees its connection close, as if the server had exited.
        return;
    };
    let _ = inside.set_nodelay(true);
    let _ = outside.set_nodelay(true);
    let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn mirror_forwards_both_ways_and_ends() {
        // The mirror needs another port than the server here, so the forwarding is tested with `carry`.
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let to = server.local_addr().unwrap();
        let mode = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = mode.local_addr().unwrap();
        let limit = Arc::new(Semaphore::new(1));
        let task = tokio::spawn(accept(mode, Some((to.ip(), to.port())), limit));
        let echo = tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            let (mut reader, mut writer) = stream.split();
            tokio::io::copy(&mut reader, &mut writer).await.unwrap();
        });
        let mut client = TcpStream::connect(at).await.unwrap();
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        client.write_all(b"there and back").await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "there and back");
        echo.await.unwrap();
        task.abort();
    }
}
