//! Which TCP ports of the host are listened on, and by whose sockets, as /proc tells it.
//!
//! Reads only; what a guest is told of them is [`super::host`]'s decision.

use std::collections::{BTreeSet, HashSet};

/// Ports told to a guest at most; the agent takes no more.
const TOLD_LIMIT: usize = 1024;
/// "Listening" in /proc/net/tcp.
const LISTENING: &str = "0A";

/// Ports that somebody listens on in this process's network namespace, without those that are `ours` by port and inode.
pub fn host_ports(ours: impl Fn(u16, u64) -> bool) -> Vec<u32> {
    let mut found = BTreeSet::new();
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        let text = std::fs::read_to_string(table).unwrap_or_default();
        let others = listening(&text).filter(|&(port, inode)| !ours(port, inode));
        found.extend(others.map(|(port, _)| port));
    }
    found.into_iter().take(TOLD_LIMIT).map(u32::from).collect()
}

/// Port and inode of the listening sockets in the text of /proc/net/tcp or tcp6.
fn listening(table: &str) -> impl Iterator<Item = (u16, u64)> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let port = fields.next()?.split_once(':')?.1;
        (fields.nth(1)? == LISTENING).then_some(())?;
        // Queues, timer, retransmissions, uid and timeout stand between.
        let inode = fields.nth(5)?.parse().ok()?;
        Some((u16::from_str_radix(port, 16).ok()?, inode))
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_inodes_of_a_table() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
               0: 00000000:2EE3 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n\
               1: 0100007F:0051 0100007F:1111 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0\n\
               2: 00000000000000000000000000000000:0016 0:0 0A 0:0 0:0 0 0 0 4713\nbroken\n   3: 0:1 0:0 0A\n";
        assert_eq!(
            listening(text).collect::<Vec<_>>(),
            [(12003, 4711), (22, 4713)]
        );
    }
}
