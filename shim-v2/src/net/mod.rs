//! The pod's network on the host's side: a tap beside each interface that CNI made, and what the guest is told about it.
//!
//! It runs no plugin and keeps no lease (boxlite-cri or containerd do) and configures nothing in the guest (Guest.Init
//! does). Everything happens inside the pod's network namespace, on a thread of its own that entered it: a worker of the
//! async runtime must never change its namespace.
//!
//! Flow: `sandbox` → [`attach`] → [`describe`] reads links, addresses, routes → [`join`] makes the tap and redirects →
//! [`PodNetwork`], which the bundle keeps.

mod describe;
pub mod host;
mod join;
mod listening;
pub mod tap;
pub mod user;

use boxlite_proto::boxlite::v1 as wire;
use boxlite_proto::vmm::Nic;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long everything in the namespace may take: a handful of netlink round trips.
const LIMIT: Duration = Duration::from_secs(10);
/// Most interfaces a pod may have: each takes a device slot of the VMM.
const INTERFACE_LIMIT: usize = 8;

/// Why a pod's network could not be read or joined.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The namespace's file cannot be opened or entered.
    #[error("network namespace {path}")]
    Namespace {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A netlink request failed.
    #[error("{step} of interface {interface:?}")]
    Netlink {
        step: &'static str,
        interface: String,
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// A system call failed.
    #[error("{step}")]
    System {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// More interfaces than a VM gets.
    #[error("network namespace {path} has {count} interfaces, at most {INTERFACE_LIMIT} fit a VM")]
    TooMany { path: PathBuf, count: usize },
    /// Netlink did not answer in time.
    #[error("network namespace {path}: no answer from netlink within {LIMIT:?}")]
    Timeout { path: PathBuf },
}

/// One interface as CNI left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInterface {
    /// Name in the pod, e.g. eth0.
    pub name: String,
    /// Index in the network namespace.
    pub index: u32,
    /// aa:bb:cc:dd:ee:ff
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
    /// CIDR, IPv4 and IPv6, without link-local ones.
    pub addresses: Vec<String>,
}

/// One route as CNI left it; the fields are those of the wire's Route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRoute {
    /// CIDR; empty for a default route.
    pub destination: String,
    /// Address; empty for a route on the link.
    pub gateway: String,
    /// Name of the interface.
    pub interface: String,
    /// Preferred source address, or empty.
    pub source: String,
    /// rtnetlink scope.
    pub scope: u32,
    /// Address family.
    pub ipv6: bool,
}

/// What a pod's namespace offers its VM. Kept in the bundle, so that a second start gives the same.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PodNetwork {
    /// Interfaces in the order of their index.
    pub interfaces: Vec<PodInterface>,
    /// Routes of the main table that the kernel did not make by itself.
    pub routes: Vec<PodRoute>,
}

impl PodNetwork {
    /// The VM's cards, in the order of the interfaces.
    pub fn nics(&self) -> Vec<Nic> {
        let nic = |(index, interface): (usize, &PodInterface)| Nic {
            tap: tap_name(index),
            mac: interface.mac.clone(),
            mtu: interface.mtu,
        };
        self.interfaces.iter().enumerate().map(nic).collect()
    }

    /// As Guest.Init wants the interfaces.
    pub fn wire_interfaces(&self) -> Vec<wire::Interface> {
        let interface = |from: &PodInterface| wire::Interface {
            name: from.name.clone(),
            mac: from.mac.clone(),
            mtu: from.mtu,
            addresses: from.addresses.clone(),
        };
        self.interfaces.iter().map(interface).collect()
    }

    /// As Guest.Init wants the routes.
    pub fn wire_routes(&self) -> Vec<wire::Route> {
        let route = |from: &PodRoute| wire::Route {
            destination: from.destination.clone(),
            gateway: from.gateway.clone(),
            interface: from.interface.clone(),
            source: from.source.clone(),
            scope: from.scope,
            ipv6: from.ipv6,
        };
        self.routes.iter().map(route).collect()
    }
}

fn tap_name(index: usize) -> String {
    format!("{TAP_PREFIX}{index}")
}

/// Taps are called tap0, tap1 …; an interface of that name is never taken for one of CNI's.
const TAP_PREFIX: &str = "tap";

/// Makes a tap beside every interface of the namespace, joins both by redirects, and tells what CNI configured. May be
/// repeated: taps and redirects that are there stay. Blocks for some milliseconds; call it off the async runtime.
///
/// # Errors
/// See [`NetError`]; taps made before the failure stay until [`detach`] or the namespace's end.
pub fn attach(netns: &Path) -> Result<PodNetwork, NetError> {
    inside(netns, async |handle| {
        let network = describe::read(&handle).await?;
        if network.interfaces.len() > INTERFACE_LIMIT {
            return Err(NetError::TooMany {
                path: netns.to_owned(),
                count: network.interfaces.len(),
            });
        }
        for (index, interface) in network.interfaces.iter().enumerate() {
            join::join(&handle, interface, &tap_name(index)).await?;
        }
        Ok(network)
    })
}

/// Takes the taps and redirects away again. Succeeds on what is gone, the namespace included.
///
/// # Errors
/// See [`NetError`].
pub fn detach(netns: &Path) -> Result<(), NetError> {
    if !netns.exists() {
        return Ok(());
    }
    inside(netns, async |handle| join::part(&handle).await)
}

/// Runs `work` on a thread that entered `netns`, with a netlink connection of that namespace.
fn inside<T: Send>(
    netns: &Path,
    work: impl AsyncFnOnce(rtnetlink::Handle) -> Result<T, NetError> + Send,
) -> Result<T, NetError> {
    let system = |step| move |source| NetError::System { step, source };
    let namespace = |source| NetError::Namespace {
        path: netns.to_owned(),
        source,
    };
    let on_thread = move || {
        let file = std::fs::File::open(netns).map_err(namespace)?;
        setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| namespace(errno.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(system("starting a runtime"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(system("opening netlink"))?;
            let connection = tokio::spawn(connection);
            let result = tokio::time::timeout(LIMIT, work(handle)).await;
            connection.abort();
            result.unwrap_or_else(|_| {
                Err(NetError::Timeout {
                    path: netns.to_owned(),
                })
            })
        })
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, on_thread)
            .map_err(system("starting a thread"))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(system("a thread")(std::io::Error::other("it panicked"))))
    })
}

#[cfg(test)]
mod tests;
