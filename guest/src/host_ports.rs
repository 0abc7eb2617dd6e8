//! Ports of a pod in the host's network: what listens on one side can be reached on the other.
//!
//! The host tells which TCP ports are listened on there; the agent listens on the same ones, on the loopback, and carries
//! each connection to the host through the VM's user-mode network card. The other way round the agent tells which ports
//! the pod's own processes listen on, and the host carries connections here by `Guest.PortForward`. So `localhost` is the
//! node's as far as TCP goes, and a port that is taken on one side is taken on both.
//!
//! Where the guest's sockets are the host's already (TSI) there is nothing to carry: the agent listens where nobody dials, so
//! that the pod's table of sockets shows the host's ports ([`plain`]).
//!
//! Called by `Guest.HostPorts`; everything ends when that stream is dropped.

mod plain;

use crate::status::status;
use boxlite_proto::boxlite::v1::{ErrorKind, HostPortsRequest, HostPortsResponse, ListeningPort};
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

/// How often the pod's own listeners are looked at: as late may a port be reachable from the host. A look costs well under
/// a millisecond, also emulated.
const LOOK: Duration = Duration::from_millis(500);
/// Longest dial to the host.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections to the host at one time; more wait in the listeners' backlogs.
const CONNECTION_LIMIT: usize = 512;
/// Ports of the host taken over at most; a node has a few dozen.
const PORT_LIMIT: usize = 1024;

/// Reads the first message, listens on its ports, and returns the answering stream: its first item is what the pod listens
/// on by then, and one follows each change.
pub async fn open(
    mut requests: Streaming<HostPortsRequest>,
) -> Result<impl Stream<Item = Result<HostPortsResponse, Status>> + Send + 'static, Status> {
    let first = requests
        .message()
        .await?
        .ok_or_else(|| invalid("gateway", "the first message names the gateway".into()))?;
    let front = match first.gateway.as_str() {
        "" => Front::Shown(plain::pool()),
        text => Front::Carried(
            text.parse()
                .map_err(|_| invalid("gateway", format!("{text:?} is no IPv4 address")))?,
        ),
    };
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut exchange = Exchange {
        requests,
        looks,
        mirrors: Mirrors::new(front),
        told: None,
    };
    exchange.mirrors.set(&first.ports).await;
    Ok(futures::stream::unfold(Some(exchange), Exchange::step))
}

fn invalid(field: &str, message: String) -> Status {
    status(ErrorKind::InvalidArgument, field, message)
}

/// What a listener on a port of the host does.
#[derive(Clone, Copy)]
enum Front {
    /// Takes the connections to the loopback and carries them to this address.
    Carried(Ipv4Addr),
    /// Only stands in the table.
    Shown(&'static plain::Pool),
}

impl Front {
    async fn listen(self, port: u16) -> std::io::Result<TcpListener> {
        match self {
            Self::Carried(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await,
            Self::Shown(pool) => TcpListener::from_std(pool.listen(port)?),
        }
    }
}

struct Exchange {
    requests: Streaming<HostPortsRequest>,
    looks: Interval,
    mirrors: Mirrors,
    /// As last sent.
    told: Option<Vec<ListeningPort>>,
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

    /// The next answer; none after the host closed its side.
    async fn next(&mut self) -> Result<Option<HostPortsResponse>, Status> {
        loop {
            tokio::select! {
                request = self.requests.message() => match request? {
                    Some(request) => self.mirrors.set(&request.ports).await,
                    None => return Ok(None),
                },
                _ = self.looks.tick() => {
                    let ports = self.own_ports();
                    if self.told.as_ref() != Some(&ports) {
                        self.told = Some(ports.clone());
                        return Ok(Some(HostPortsResponse { ports }));
                    }
                    // A port of the host that was taken here may be free by now.
                    self.mirrors.retry().await;
                }
            }
        }
    }

    /// What the pod's processes listen on: everything but the mirrors.
    fn own_ports(&self) -> Vec<ListeningPort> {
        let mut found = BTreeMap::new();
        for socket in listening_sockets() {
            if !self.mirrors.has(socket.port) {
                // Reachable from outside as soon as one of its sockets is.
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

/// Listeners on the host's ports. Dropping it closes them with their connections.
struct Mirrors {
    front: Front,
    wanted: BTreeSet<u16>,
    listening: HashMap<u16, AbortHandle>,
    tasks: JoinSet<()>,
    connections: Arc<Semaphore>,
}

impl Mirrors {
    fn new(front: Front) -> Self {
        Self {
            front,
            wanted: BTreeSet::new(),
            listening: HashMap::new(),
            tasks: JoinSet::new(),
            connections: Arc::new(Semaphore::new(CONNECTION_LIMIT)),
        }
    }

    fn has(&self, port: u16) -> bool {
        self.listening.contains_key(&port)
    }

    /// Listens on these ports and no others.
    async fn set(&mut self, ports: &[u32]) {
        self.wanted = ports
            .iter()
            .filter_map(|port| u16::try_from(*port).ok().filter(|port| *port != 0))
            .take(PORT_LIMIT)
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

    /// Listens where it could not before: a process of the pod may have had the port.
    async fn retry(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        for &port in &self.wanted {
            if self.listening.contains_key(&port) {
                continue;
            }
            let Ok(listener) = self.front.listen(port).await else {
                continue;
            };
            let to = match self.front {
                Front::Carried(gateway) => Some((gateway.into(), port)),
                Front::Shown(_) => None,
            };
            let task = self
                .tasks
                .spawn(accept(listener, to, Arc::clone(&self.connections)));
            self.listening.insert(port, task);
        }
    }
}

/// Accepts until it is aborted, which ends its connections, too. A connection that goes nowhere is closed.
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
            // Out of descriptors: those that are open must end first.
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

async fn carry(mut inside: TcpStream, to: (IpAddr, u16)) {
    let dialled = tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect(to)).await;
    let Ok(Ok(mut outside)) = dialled else {
        // The client sees its connection close, as with a server that goes away.
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
    async fn a_mirror_carries_both_ways_and_ends() {
        // Both ends are here: the mirror's port is another than the server's, so the dial is tested by `carry` itself.
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let to = server.local_addr().unwrap();
        let front = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = front.local_addr().unwrap();
        let limit = Arc::new(Semaphore::new(1));
        let task = tokio::spawn(accept(front, Some((to.ip(), to.port())), limit));
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
