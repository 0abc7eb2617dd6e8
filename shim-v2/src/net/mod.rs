//! The pod's network on the host's side: a tap beside each CNI interface, and the configuration handed to the guest.
//!
//! CNI plugins and leases belong to boxlite-cri or containerd, configuration in the guest to Guest.Init. All work happens inside
//! the pod's network namespace, on a dedicated thread that entered it: a worker of the async runtime must never change its
//! namespace.
//!
//! Flow: `sandbox` → [`attach`] → [`describe`] reads links, addresses, routes → [`join`] creates the tap and redirects →
//! [`PodNetwork`], kept in the bundle.

mod describe;
pub mod host;
mod join;
mod listening;
pub mod passt;
pub mod slirp;
pub mod tap;

use boxlite_proto::boxlite::v1 as wire;
use boxlite_proto::vmm::Nic;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

/// Timeout of all work in the namespace: a handful of netlink round trips.
const NETLINK_TIMEOUT: Duration = Duration::from_secs(10);
/// MAC of a warm VM's NIC until its pod is known: locally administered, and never on a network, because the tap is down.
pub const BOOT_MAC: &str = "02:00:00:00:00:01";
/// Maximum number of interfaces of a pod: each takes a device slot of the VMM.
const MAX_INTERFACES: usize = 8;

/// Error while reading or joining a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The namespace cannot be opened or entered.
    #[error("failed to enter network namespace {path}")]
    Namespace {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A netlink request failed.
    #[error("failed to {step} (interface {interface:?})")]
    Netlink {
        step: &'static str,
        interface: String,
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// A system call failed.
    #[error("failed to {step}")]
    System {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The pod has more interfaces than a VM supports.
    #[error("network namespace {path} has {count} interfaces (maximum {MAX_INTERFACES})")]
    TooMany { path: PathBuf, count: usize },
    /// Netlink did not answer in time.
    #[error("network namespace {path}: no netlink answer within {NETLINK_TIMEOUT:?}")]
    Timeout { path: PathBuf },
}

/// An interface as CNI configured it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInterface {
    /// Name in the pod, e.g. eth0.
    pub name: String,
    /// Index in the network namespace.
    pub index: u32,
    /// MAC address as aa:bb:cc:dd:ee:ff.
    pub mac: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Addresses as CIDR, IPv4 and IPv6, without link-local ones.
    pub addresses: Vec<String>,
}

/// A route as CNI configured it, with the fields of the wire's Route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRoute {
    /// Destination as CIDR; empty for a default route.
    pub destination: String,
    /// Gateway address; empty for an on-link route.
    pub gateway: String,
    /// Name of the interface.
    pub interface: String,
    /// Preferred source address, or empty.
    pub source: String,
    /// Scope as in rtnetlink.
    pub scope: u32,
    /// True for IPv6, false for IPv4.
    pub ipv6: bool,
}

/// Configuration of a pod's network namespace. Kept in the bundle, so that a second start has the same.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PodNetwork {
    /// Interfaces in the order of their index.
    pub interfaces: Vec<PodInterface>,
    /// Routes of the main table, except those that the kernel derives.
    pub routes: Vec<PodRoute>,
}

impl PodNetwork {
    /// Returns the VM's NICs, in the order of the interfaces.
    pub fn nics(&self) -> Vec<Nic> {
        let nic = |(index, interface): (usize, &PodInterface)| Nic {
            tap: tap_name(index),
            mac: interface.mac.clone(),
            mtu: interface.mtu,
        };
        self.interfaces.iter().enumerate().map(nic).collect()
    }

    /// Returns the interfaces for Guest.Init.
    pub fn wire_interfaces(&self) -> Vec<wire::Interface> {
        let interface = |from: &PodInterface| wire::Interface {
            name: from.name.clone(),
            mac: from.mac.clone(),
            mtu: from.mtu,
            addresses: from.addresses.clone(),
            ..Default::default()
        };
        self.interfaces.iter().map(interface).collect()
    }

    /// Returns the routes for Guest.Init.
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

/// Returns the NIC of a warm VM, on the tap that [`prepare`] created. The guest sets the pod's MAC and MTU later.
pub fn warm_nic() -> Nic {
    Nic {
        tap: tap_name(0),
        mac: BOOT_MAC.to_owned(),
        mtu: 0,
    }
}

fn tap_name(index: usize) -> String {
    format!("{TAP_PREFIX}{index}")
}

/// Name prefix of our taps (tap0, tap1 …); interfaces with such a name are not treated as CNI's.
const TAP_PREFIX: &str = "tap";

/// Creates a tap beside every interface of the namespace, joins both by redirects, and returns the CNI configuration.
/// Idempotent. Blocks for some milliseconds; call it off the async runtime.
///
/// # Errors
/// See [`NetError`]; taps created before the failure remain until [`detach`] or the namespace's end.
pub fn attach(netns: &Path) -> Result<PodNetwork, NetError> {
    inside(netns, async |handle| {
        let network = describe::read(&handle).await?;
        if network.interfaces.len() > MAX_INTERFACES {
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

/// Creates the tap of a warm VM, whose pod is not known yet; [`attach`] joins it with the interface that CNI adds later. Blocks
/// like that.
///
/// # Errors
/// See [`NetError`].
pub fn prepare(netns: &Path) -> Result<(), NetError> {
    inside(netns, async |_| {
        tap::create(&tap_name(0)).map_err(|source| NetError::System {
            step: "create tap",
            source,
        })
    })
}

/// Removes the taps and redirects. Succeeds if they or the namespace no longer exist.
///
/// # Errors
/// See [`NetError`].
pub fn detach(netns: &Path) -> Result<(), NetError> {
    if !netns.exists() {
        return Ok(());
    }
    inside(netns, async |handle| join::part(&handle).await)
}

/// Runs `work` on a thread that entered `netns`, with a netlink connection in that namespace.
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
            .map_err(system("start a runtime"))?;
        runtime.block_on(async {
            let (connection, handle, _) =
                rtnetlink::new_connection().map_err(system("open netlink"))?;
            let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
            let result = tokio::time::timeout(NETLINK_TIMEOUT, work(handle)).await;
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
            .map_err(system("start a thread"))?;
        thread.join().unwrap_or_else(|_| {
            Err(system("configure the network")(std::io::Error::other(
                "thread panicked",
            )))
        })
    })
}

#[cfg(test)]
mod tests;
