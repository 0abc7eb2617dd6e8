//! [`HostPorts`]: the TCP ports of a pod's processes, listened on outside the VM, for three kinds of pods ([`Place`]).
//!
//! In the host's network, where the VMM has no TSI (Qemu): in the host's namespace, which is this process's; and the guest
//! hears which ports the host listens on. With TSI (Krun) it hears the same, to show them, and nothing is listened on here,
//! since libkrun does it. Under containerd: on the loopback of the pod's namespace, where its CRI plugin
//! dials for port-forward; the pod's own address does not come by here.
//!
//! Outgoing connections are not its business: they leave through the VM's user-mode card ([`crate::vmm::qemu`]) or by TSI.
//! The guest's half is the agent's `host_ports`; bytes go by `Guest.PortForward`.
//!
//! The guest is hostile: it may take free ports of the host, as any process in the host's network may, up to
//! [`PORT_LIMIT`]; never one that somebody has.

use super::listening::{host_ports, sockets_of};
use super::user;
use crate::error::{Result, ShimError};
use boxlite_portal::{GuestSession, PortalError};
use boxlite_proto::boxlite::v1::{
    HostPortsRequest, HostPortsResponse, ListeningPort, PortForwardRequest,
};
use boxlite_proto::names::CHUNK_LIMIT;
use boxlite_sys::report::Report;
use bytes::BytesMut;
use nix::sched::{CloneFlags, setns};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

/// How often the host's listeners are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// Longest first exchange: the guest answers when it listens.
const FIRST_LIMIT: Duration = Duration::from_secs(20);
/// Pause before a broken exchange is begun again.
const PAUSE: Duration = Duration::from_secs(1);
/// Ports of the host a guest may take.
const PORT_LIMIT: usize = 256;
/// Connections from the host into one guest at one time; more wait in the backlogs.
const CONNECTION_LIMIT: usize = 256;
/// Requests of one exchange, and chunks of one connection, that wait for the guest.
const QUEUE: usize = 4;

/// Where a pod's ports are listened on.
#[derive(Debug, Clone)]
pub enum Place {
    /// In the host's network namespace; its ports are the guest's too.
    Host,
    /// By the VMM, the process of this pid, in the host's network namespace. Here the host's ports are only told.
    Vmm(i32),
    /// On the loopback of the pod's network namespace. Nobody else listens there.
    Pod(Arc<File>),
}

impl Place {
    /// The pod's, by the path of its namespace.
    ///
    /// # Errors
    /// Io, naming the path.
    pub fn pod(netns: &Path) -> Result<Self> {
        let opened = File::open(netns).map_err(ShimError::io("open", netns.display()))?;
        Ok(Self::Pod(Arc::new(opened)))
    }

    /// Ports that the guest is told, without our own.
    fn told(&self, own: &Listeners) -> Vec<u32> {
        match self {
            Self::Host => host_ports(|port, _| own.contains_key(&port)),
            Self::Vmm(pid) => {
                let own = sockets_of(*pid);
                host_ports(|_, inode| own.contains(&inode))
            }
            Self::Pod(_) => Vec::new(),
        }
    }

    /// Where the guest finds those ports.
    fn gateway(&self) -> String {
        match self {
            Self::Vmm(_) => String::new(),
            // Of no use to a guest that hears of no ports.
            Self::Host | Self::Pod(_) => user::GATEWAY.to_string(),
        }
    }

    /// The guest's list as a map, bounded; empty where the VMM listens.
    fn wanted(&self, ports: &[ListeningPort]) -> HashMap<u16, bool> {
        match self {
            Self::Vmm(_) => HashMap::new(),
            Self::Host | Self::Pod(_) => wanted(ports),
        }
    }

    async fn bind(&self, port: u16, loopback: bool) -> io::Result<TcpListener> {
        match self {
            Self::Host => bind(port, loopback).await,
            Self::Vmm(_) => Err(io::ErrorKind::Unsupported.into()),
            Self::Pod(netns) => {
                let netns = Arc::clone(netns);
                let made = tokio::task::spawn_blocking(move || bind_within(&netns, port));
                TcpListener::from_std(made.await.map_err(io::Error::other)??)
            }
        }
    }
}

/// One exchange with one guest.
pub struct HostPorts {
    session: GuestSession,
    place: Place,
    /// What the guest listens on, by port: on its loopback only?
    wanted: HashMap<u16, bool>,
    listeners: Listeners,
    tasks: JoinSet<()>,
    connections: Arc<Semaphore>,
    outgoing: mpsc::Sender<HostPortsRequest>,
    answers: Streaming<HostPortsResponse>,
    told: Vec<u32>,
    /// Ports that could not be had, told in the log once.
    refused: BTreeSet<u16>,
}

impl HostPorts {
    /// Tells the guest the host's ports and waits until it listens on them: a container that starts now finds them.
    ///
    /// # Errors
    /// The guest refuses, or does not answer in time. Nothing stays.
    pub async fn begin(session: &GuestSession, place: Place) -> Result<Self> {
        // A connection of its own: the exchange lasts as long as the VM.
        let session = session.dedicated();
        let none = Listeners::new();
        let begun = tokio::time::timeout(FIRST_LIMIT, open(&session, &place, &none));
        let (outgoing, answers, told) = begun.await.map_err(|_| slow()).and_then(|opened| {
            opened.map_err(ShimError::boot("tell the guest the host's ports"))
        })?;
        Ok(Self {
            session,
            place,
            wanted: HashMap::new(),
            listeners: HashMap::new(),
            tasks: JoinSet::new(),
            connections: Arc::new(Semaphore::new(CONNECTION_LIMIT)),
            outgoing,
            answers,
            told,
            refused: BTreeSet::new(),
        })
    }

    /// Goes on until `ended`; then all listeners and connections are closed. The owner is the shim's task tracker.
    pub async fn run(mut self, ended: CancellationToken) {
        tokio::select! {
            () = self.follow() => {}
            () = ended.cancelled() => {}
        }
    }

    async fn follow(&mut self) {
        loop {
            if let Err(error) = self.until_broken().await {
                tracing::warn!(error = %Report(&error), "the exchange of ports broke; beginning again");
            }
            tokio::time::sleep(PAUSE).await;
            match open(&self.session, &self.place, &self.listeners).await {
                Ok((outgoing, answers, told)) => {
                    self.outgoing = outgoing;
                    self.answers = answers;
                    self.told = told;
                }
                Err(error) => tracing::debug!(error = %Report(&error), "no exchange of ports"),
            }
        }
    }

    async fn until_broken(&mut self) -> std::result::Result<(), PortalError> {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                answer = self.answers.message() => {
                    let answer = answer.map_err(|status| PortalError::from_status("Guest.HostPorts", status))?;
                    match answer {
                        Some(answer) => {
                            self.wanted = self.place.wanted(&answer.ports);
                            self.listen().await;
                        }
                        None => return Ok(()),
                    }
                }
                _ = looks.tick() => {
                    // A port that somebody had may be free by now.
                    self.listen().await;
                    let ports = self.place.told(&self.listeners);
                    if ports != self.told {
                        self.told.clone_from(&ports);
                        let request = HostPortsRequest { ports, gateway: String::new() };
                        if self.outgoing.send(request).await.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    /// Listens on the guest's ports and no others.
    async fn listen(&mut self) {
        let wanted = &self.wanted;
        self.listeners.retain(|port, (loopback, task)| {
            let keep = wanted.get(port) == Some(loopback);
            if !keep {
                task.abort();
            }
            keep
        });
        // Aborted listeners are closed when their tasks have ended.
        while self.tasks.try_join_next().is_some() {}
        for (&port, &loopback) in wanted {
            if self.listeners.contains_key(&port) {
                continue;
            }
            match self.place.bind(port, loopback).await {
                Ok(listener) => {
                    self.refused.remove(&port);
                    let task = self.tasks.spawn(accept(
                        listener,
                        port,
                        self.session.clone(),
                        Arc::clone(&self.connections),
                    ));
                    self.listeners.insert(port, (loopback, task));
                }
                Err(error) if self.refused.insert(port) => {
                    tracing::warn!(port, %error, "the pod listens on a port that the host cannot give it");
                }
                Err(_) => {}
            }
        }
    }
}

fn slow() -> ShimError {
    ShimError::from(PortalError::Deadline {
        call: "Guest.HostPorts",
        limit: FIRST_LIMIT,
    })
}

/// The guest's list as a map, bounded.
fn wanted(ports: &[ListeningPort]) -> HashMap<u16, bool> {
    ports
        .iter()
        .take(PORT_LIMIT)
        .filter_map(|port| Some((u16::try_from(port.port).ok()?, port.loopback)))
        .filter(|(port, _)| *port != 0)
        .collect()
}

/// By port: on the loopback only, and the task that has the listener.
type Listeners = HashMap<u16, (bool, AbortHandle)>;

type Opened = (
    mpsc::Sender<HostPortsRequest>,
    Streaming<HostPortsResponse>,
    Vec<u32>,
);

async fn open(
    session: &GuestSession,
    place: &Place,
    own: &Listeners,
) -> std::result::Result<Opened, PortalError> {
    let (outgoing, requests) = mpsc::channel(QUEUE);
    let ports = place.told(own);
    let first = HostPortsRequest {
        ports: ports.clone(),
        gateway: place.gateway(),
    };
    // Nobody else has the sender yet: there is room.
    drop(outgoing.send(first).await);
    let answers = session
        .guest()
        .host_ports(ReceiverStream::new(requests))
        .await?;
    Ok((outgoing, answers, ports))
}

/// IPv6 takes IPv4 along, where the host has it.
async fn bind(port: u16, loopback: bool) -> io::Result<TcpListener> {
    if loopback {
        return TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
    }
    let both = TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await;
    match both {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
        }
        result => result,
    }
}

/// Listens in another network namespace. The thread that goes there ends: none of the runtime's may stay in it. Blocks for
/// a moment.
fn bind_within(netns: &File, port: u16) -> io::Result<std::net::TcpListener> {
    std::thread::scope(|scope| {
        let there = scope.spawn(|| {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        there
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread died")))
    })
}

/// Accepts until it is aborted, which ends its connections, too.
async fn accept(
    listener: TcpListener,
    port: u16,
    session: GuestSession,
    connections: Arc<Semaphore>,
) {
    let mut open = JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((outside, _)) => {
                // Each has a connection of its own: all streams of one share a window, and a slow one would stall the others.
                let session = session.dedicated();
                open.spawn(async move {
                    if let Err(error) = carry(outside, port, &session).await {
                        tracing::debug!(port, error = %Report(&error), "connection into the pod");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(port, %error, "accept");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Carries one connection, with half-close kept both ways, until both directions have ended or one breaks.
async fn carry(
    outside: TcpStream,
    port: u16,
    session: &GuestSession,
) -> std::result::Result<(), PortalError> {
    let _ = outside.set_nodelay(true);
    let (mut reader, mut writer) = outside.into_split();
    let (outgoing, requests) = mpsc::channel(QUEUE);
    let first = PortForwardRequest {
        port: port.into(),
        ..Default::default()
    };
    drop(outgoing.send(first).await);
    let mut answers = session
        .guest()
        .port_forward(ReceiverStream::new(requests))
        .await?;
    let inbound = async {
        loop {
            let mut data = BytesMut::with_capacity(CHUNK_LIMIT);
            // An error of the client's is the end of what it sends.
            let eof = !matches!(reader.read_buf(&mut data).await, Ok(count) if count > 0);
            let request = PortForwardRequest {
                data: data.freeze(),
                eof,
                ..Default::default()
            };
            if outgoing.send(request).await.is_err() || eof {
                return;
            }
        }
    };
    let outbound = async {
        let broken = |status| PortalError::from_status("Guest.PortForward", status);
        while let Some(answer) = answers.message().await.map_err(broken)? {
            if writer.write_all(&answer.data).await.is_err() {
                return Ok(false);
            }
            if answer.eof {
                // The other direction goes on.
                return Ok(writer.shutdown().await.is_ok());
            }
        }
        Ok(false)
    };
    tokio::pin!(inbound, outbound);
    tokio::select! {
        () = &mut inbound => outbound.await.map(drop),
        half = &mut outbound => {
            // Where it broke, or the client is gone, dropping both tells either side.
            if half? {
                inbound.await;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pods_port_is_in_its_namespace_and_not_here() {
        const PORT: u16 = 48_231;
        let net = crate::containerd::private_net::PrivateNet::create().unwrap();
        let place = Place::pod(&net.path()).unwrap();
        let listener = place.bind(PORT, false).await.unwrap();
        assert_eq!(
            listener.local_addr().unwrap(),
            (Ipv4Addr::LOCALHOST, PORT).into()
        );
        assert!(!Place::Host.told(&HashMap::new()).contains(&u32::from(PORT)));
        assert!(place.bind(PORT, false).await.is_err(), "it is taken there");
    }

    #[tokio::test]
    async fn our_own_listeners_are_not_the_hosts() {
        let listener = bind(0, true).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(Place::Host.told(&HashMap::new()).contains(&u32::from(port)));
        let task = tokio::spawn(std::future::pending::<()>());
        let own = HashMap::from([(port, (true, task.abort_handle()))]);
        assert!(!Place::Host.told(&own).contains(&u32::from(port)));
        task.abort();
        // As libkrun's, which the process of the VM has.
        let vmm = Place::Vmm(std::process::id().cast_signed());
        assert!(!vmm.told(&HashMap::new()).contains(&u32::from(port)));
        let another = Place::Vmm(1);
        assert!(another.told(&HashMap::new()).contains(&u32::from(port)));
    }
}
