//! Which TCP ports of the host are listened on, and by whose sockets, as /proc tells it.
//!
//! Reads only; what a guest is told of them is [`super::host`]'s decision.

use boxlite_sys::tcp_table::listening_sockets;
use std::collections::{BTreeSet, HashSet};

/// Ports told to a guest at most; the agent takes no more.
const TOLD_LIMIT: usize = 1024;
/// Ports that somebody listens on in this process's network namespace, without those that are `ours` by port and inode.
pub fn host_ports(ours: impl Fn(u16, u64) -> bool) -> Vec<u32> {
    let found: BTreeSet<u16> = listening_sockets()
        .into_iter()
        .filter(|socket| !ours(socket.port, socket.inode))
        .map(|socket| socket.port)
        .collect();
    found.into_iter().take(TOLD_LIMIT).map(u32::from).collect()
}

/// Inodes of a process's open sockets; none where it has ended.
pub fn sockets_of(pid: i32) -> HashSet<u64> {
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
