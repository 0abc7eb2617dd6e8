//! [`HostPorts`]: forwards the TCP ports of a pod's processes from outside the VM, in one of three scopes ([`BindScope`]).
//!
//! For a pod in the host's network without TSI (Qemu), ports are bound in the host's network namespace, which is this process's,
//! and the guest receives the list of ports that the host listens on, and the host's addresses, which its clients can bind.
//! With TSI (Krun) the guest receives both, too, the ports for display, and nothing is bound here because libkrun does it.
//! Under containerd, ports are bound on the loopback of the pod's namespace, where its CRI plugin connects for port-forward;
//! traffic to the pod's address does not pass through it.
//!
//! Outgoing connections leave through the VM's slirp NIC ([`super::slirp`]) or by TSI. The guest's half is the agent's
//! `host_ports`; bytes travel over `Guest.PortForward`.
//!
//! The guest is hostile. Like any process in the host's network it can take free ports of the host, up to [`MAX_PORTS`], but
//! no port that is in use.

use super::listening::{host_addresses, host_ports, sockets_of};
use super::slirp;
use crate::error::{Result, ShimError};
use boxlite_portal::{GuestSession, PortalError};
use boxlite_proto::boxlite::v1::{
    HostPortsRequest, HostPortsResponse, ListeningPort, PortForwardRequest,
};
use boxlite_proto::names::MAX_CHUNK_BYTES;
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

/// Interval at which the host's listeners are polled.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Timeout of the first exchange: the guest answers once it listens.
const FIRST_EXCHANGE_TIMEOUT: Duration = Duration::from_secs(20);
/// Delay before a broken exchange is reopened.
const REOPEN_DELAY: Duration = Duration::from_secs(1);
/// Maximum number of host ports per guest.
const MAX_PORTS: usize = 256;
/// Maximum number of concurrent connections from the host into one guest; further ones wait in the backlogs.
const MAX_CONNECTIONS: usize = 256;
/// Number of requests of one exchange, and of chunks of one connection, buffered for the guest.
const CHANNEL_CAPACITY: usize = 4;

/// Network namespace in which a pod's ports are bound.
#[derive(Debug, Clone)]
pub enum BindScope {
    /// The host's network namespace; the guest sees the host's ports.
    Host,
    /// None: the VMM, the process with this pid, binds in the host's network namespace. The guest only sees the host's ports.
    Vmm(i32),
    /// The loopback of the pod's network namespace, which has no other listeners.
    Pod(Arc<File>),
}

impl BindScope {
    /// Opens the pod's network namespace by its path.
    ///
    /// # Errors
    /// Io with the path.
    pub fn pod(netns: &Path) -> Result<Self> {
        let opened = File::open(netns).map_err(ShimError::io("open", netns.display()))?;
        Ok(Self::Pod(Arc::new(opened)))
    }

    /// Returns the request by which the guest receives the host's ports, without our own, and addresses.
    fn request(&self, own: &Listeners) -> HostPortsRequest {
        HostPortsRequest {
            ports: self.reported(own),
            gateway: self.gateway(),
            addresses: match self {
                Self::Host | Self::Vmm(_) => host_addresses(),
                Self::Pod(_) => Vec::new(),
            },
        }
    }

    /// Returns the ports reported to the guest, without our own.
    fn reported(&self, own: &Listeners) -> Vec<u32> {
        match self {
            Self::Host => host_ports(|port, _| own.contains_key(&port)),
            Self::Vmm(pid) => {
                let own = sockets_of(*pid);
                host_ports(|_, inode| own.contains(&inode))
            }
            Self::Pod(_) => Vec::new(),
        }
    }

    /// Returns the address at which the guest reaches those ports.
    fn gateway(&self) -> String {
        match self {
            Self::Vmm(_) => String::new(),
            // Ignored by a guest that receives no ports.
            Self::Host | Self::Pod(_) => slirp::GATEWAY.to_string(),
        }
    }

    /// Returns the guest's list as a bounded map; empty if the VMM binds.
    fn listening(&self, ports: &[ListeningPort]) -> HashMap<u16, bool> {
        match self {
            Self::Vmm(_) => HashMap::new(),
            Self::Host | Self::Pod(_) => listening(ports),
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

/// The exchange of ports with one guest.
pub struct HostPorts {
    session: GuestSession,
    scope: BindScope,
    /// Ports that the guest listens on, and whether only on its loopback.
    listening: HashMap<u16, bool>,
    listeners: Listeners,
    tasks: JoinSet<()>,
    connections: Arc<Semaphore>,
    outgoing: mpsc::Sender<HostPortsRequest>,
    answers: Streaming<HostPortsResponse>,
    /// Last request sent.
    reported: HostPortsRequest,
    /// Ports that could not be bound, logged once each.
    refused: BTreeSet<u16>,
}

impl HostPorts {
    /// Reports the host's ports to the guest and waits until it listens on them, so that containers started later find them.
    ///
    /// # Errors
    /// The guest refuses or does not answer in time. No task remains.
    pub async fn start(session: &GuestSession, scope: BindScope) -> Result<Self> {
        // A dedicated connection: the exchange lasts as long as the VM.
        let session = session.dedicated();
        let none = Listeners::new();
        let first = tokio::time::timeout(FIRST_EXCHANGE_TIMEOUT, open(&session, &scope, &none));
        let (outgoing, answers, reported) = first
            .await
            .map_err(|_| first_exchange_timeout())
            .and_then(|opened| {
                opened.map_err(ShimError::boot("report the host's ports to the guest"))
            })?;
        Ok(Self {
            session,
            scope,
            listening: HashMap::new(),
            listeners: HashMap::new(),
            tasks: JoinSet::new(),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            outgoing,
            answers,
            reported,
            refused: BTreeSet::new(),
        })
    }

    /// Runs until `ended`, then closes all listeners and connections. Runs on the shim's task tracker.
    pub async fn run(mut self, ended: CancellationToken) {
        tokio::select! {
            () = self.follow() => {}
            () = ended.cancelled() => {}
        }
    }

    async fn follow(&mut self) {
        loop {
            if let Err(error) = self.until_broken().await {
                tracing::warn!(error = %Report(&error), "port exchange broke, reopening");
            }
            tokio::time::sleep(REOPEN_DELAY).await;
            match open(&self.session, &self.scope, &self.listeners).await {
                Ok((outgoing, answers, reported)) => {
                    self.outgoing = outgoing;
                    self.answers = answers;
                    self.reported = reported;
                }
                Err(error) => {
                    tracing::debug!(error = %Report(&error), "failed to reopen port exchange")
                }
            }
        }
    }

    async fn until_broken(&mut self) -> std::result::Result<(), PortalError> {
        let mut polls = tokio::time::interval(POLL_INTERVAL);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                answer = self.answers.message() => {
                    let answer = answer.map_err(|status| PortalError::from_status("Guest.HostPorts", status))?;
                    match answer {
                        Some(answer) => {
                            self.listening = self.scope.listening(&answer.ports);
                            self.listen().await;
                        }
                        None => return Ok(()),
                    }
                }
                _ = polls.tick() => {
                    // A port that was in use may be free by now.
                    self.listen().await;
                    let request = self.scope.request(&self.listeners);
                    if request != self.reported {
                        self.reported.clone_from(&request);
                        if self.outgoing.send(request).await.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    /// Binds exactly the guest's ports.
    async fn listen(&mut self) {
        let listening = &self.listening;
        self.listeners.retain(|port, (loopback, task)| {
            let keep = listening.get(port) == Some(loopback);
            if !keep {
                task.abort();
            }
            keep
        });
        // Aborted listeners close when their tasks have ended.
        while self.tasks.try_join_next().is_some() {}
        for (&port, &loopback) in listening {
            if self.listeners.contains_key(&port) {
                continue;
            }
            match self.scope.bind(port, loopback).await {
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
                    tracing::warn!(port, %error, "failed to bind port of the pod");
                }
                Err(_) => {}
            }
        }
    }
}

fn first_exchange_timeout() -> ShimError {
    ShimError::from(PortalError::Deadline {
        call: "Guest.HostPorts",
        limit: FIRST_EXCHANGE_TIMEOUT,
    })
}

/// Converts the guest's list to a bounded map.
fn listening(ports: &[ListeningPort]) -> HashMap<u16, bool> {
    ports
        .iter()
        .take(MAX_PORTS)
        .filter_map(|port| Some((u16::try_from(port.port).ok()?, port.loopback)))
        .filter(|(port, _)| *port != 0)
        .collect()
}

/// Listener tasks by port, and whether they are bound to loopback only.
type Listeners = HashMap<u16, (bool, AbortHandle)>;

type Opened = (
    mpsc::Sender<HostPortsRequest>,
    Streaming<HostPortsResponse>,
    HostPortsRequest,
);

async fn open(
    session: &GuestSession,
    scope: &BindScope,
    own: &Listeners,
) -> std::result::Result<Opened, PortalError> {
    let (outgoing, requests) = mpsc::channel(CHANNEL_CAPACITY);
    let first = scope.request(own);
    // The channel is empty, so this succeeds.
    drop(outgoing.send(first.clone()).await);
    let answers = session
        .guest()
        .host_ports(ReceiverStream::new(requests))
        .await?;
    Ok((outgoing, answers, first))
}

/// Binds IPv6 and IPv4 at once if the host has IPv6.
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

/// Binds in another network namespace, on a separate thread so that no runtime thread changes namespace. Blocks briefly.
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
            .unwrap_or_else(|_| Err(io::Error::other("binding thread panicked")))
    })
}

/// Accepts connections until aborted, which also ends its connections.
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
                // A connection each: streams share a flow-control window, so a slow one would stall the others.
                let session = session.dedicated();
                open.spawn(async move {
                    if let Err(error) = carry(outside, port, &session).await {
                        tracing::debug!(port, error = %Report(&error), "connection into the pod failed");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(port, %error, "failed to accept connection");
                tokio::time::sleep(REOPEN_DELAY).await;
            }
        }
    }
}

/// Carries one connection, keeping half-close in both directions, until both have ended or one breaks.
async fn carry(
    outside: TcpStream,
    port: u16,
    session: &GuestSession,
) -> std::result::Result<(), PortalError> {
    let _ = outside.set_nodelay(true);
    let (mut reader, mut writer) = outside.into_split();
    let (outgoing, requests) = mpsc::channel(CHANNEL_CAPACITY);
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
            let mut data = BytesMut::with_capacity(MAX_CHUNK_BYTES);
            // A read error ends the client's direction.
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
                // The other direction continues.
                return Ok(writer.shutdown().await.is_ok());
            }
        }
        Ok(false)
    };
    tokio::pin!(inbound, outbound);
    tokio::select! {
        () = &mut inbound => outbound.await.map(drop),
        half = &mut outbound => {
            // On a break, dropping both futures notifies both sides.
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
    #[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
    async fn bind_in_pod_scope_stays_in_the_pod_namespace() {
        const PORT: u16 = 48_231;
        let net = crate::containerd::private_net::PrivateNet::create().unwrap();
        let scope = BindScope::pod(&net.path()).unwrap();
        let listener = scope.bind(PORT, false).await.unwrap();
        assert_eq!(
            listener.local_addr().unwrap(),
            (Ipv4Addr::LOCALHOST, PORT).into()
        );
        assert!(
            !BindScope::Host
                .reported(&HashMap::new())
                .contains(&u32::from(PORT))
        );
        assert!(
            scope.bind(PORT, false).await.is_err(),
            "the port is in use there"
        );
    }

    #[tokio::test]
    async fn reported_ports_exclude_our_own_listeners() {
        let listener = bind(0, true).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(
            BindScope::Host
                .reported(&HashMap::new())
                .contains(&u32::from(port))
        );
        let task = tokio::spawn(std::future::pending::<()>());
        let own = HashMap::from([(port, (true, task.abort_handle()))]);
        assert!(!BindScope::Host.reported(&own).contains(&u32::from(port)));
        task.abort();
        // As with libkrun, whose process owns the sockets.
        let vmm = BindScope::Vmm(std::process::id().cast_signed());
        assert!(!vmm.reported(&HashMap::new()).contains(&u32::from(port)));
        let another = BindScope::Vmm(1);
        assert!(another.reported(&HashMap::new()).contains(&u32::from(port)));
    }
}
