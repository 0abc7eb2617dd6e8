//! Listening TCP ports of the host and the sockets that own them, read from /proc, and the host's addresses.
//!
//! [`super::host`] decides which of them a guest sees.

use boxlite_proto::names::MAX_HOST_ADDRESSES;
use boxlite_sys::tcp_table::listening_sockets;
use nix::ifaddrs::getifaddrs;
use std::collections::{BTreeSet, HashSet};

/// Maximum number of ports reported to a guest; the agent accepts no more.
const MAX_REPORTED: usize = 1024;

/// Returns the IPv4 addresses of this process's network namespace, its loopback's included. Empty if they cannot be read.
pub(crate) fn host_addresses() -> Vec<String> {
    let found: BTreeSet<_> = getifaddrs()
        .into_iter()
        .flatten()
        .filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()))
        .collect();
    found
        .into_iter()
        .take(MAX_HOST_ADDRESSES)
        .map(|address| address.to_string())
        .collect()
}

/// Returns the listening ports of this process's network namespace, except those for which `ours` (port, inode) is true.
pub(crate) fn host_ports(ours: impl Fn(u16, u64) -> bool) -> Vec<u32> {
    let found: BTreeSet<u16> = listening_sockets()
        .into_iter()
        .filter(|socket| !ours(socket.port, socket.inode))
        .map(|socket| socket.port)
        .collect();
    found
        .into_iter()
        .take(MAX_REPORTED)
        .map(u32::from)
        .collect()
}

/// Returns the inodes of a process's open sockets; empty if it has ended.
pub(crate) fn sockets_of(pid: i32) -> HashSet<u64> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"));
    let links = entries.into_iter().flatten().flatten();
    links
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .filter_map(|link| {
            let name = link.to_str()?.strip_prefix("socket:[")?;
            name.strip_suffix(']')?.parse().ok()
        })
        .collect()
}
