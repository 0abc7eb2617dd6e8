//! Listening TCP sockets of a network namespace, from `/proc/net/tcp` and `/proc/net/tcp6`.

/// State "listening" in the tables.
const LISTENING: &str = "0A";

/// One listening socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListeningSocket {
    /// TCP port.
    pub port: u16,
    /// True if only the loopback interface reaches it.
    pub loopback: bool,
    /// Inode number of the socket.
    pub inode: u64,
}

/// Returns the listening sockets of the calling process's network namespace, IPv4 before IPv6. A table that cannot be read
/// (IPv6 is disabled) counts as empty.
pub fn listening_sockets() -> Vec<ListeningSocket> {
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
    tables
        .iter()
        .flat_map(|path| parse(&std::fs::read_to_string(path).unwrap_or_default()))
        .collect()
}

fn parse(table: &str) -> Vec<ListeningSocket> {
    table.lines().skip(1).filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<ListeningSocket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    if fields.nth(1)? != LISTENING {
        return None;
    }
    // Queues, timer, retransmissions, uid and timeout precede the inode.
    let inode = fields.nth(5)?.parse().ok()?;
    // Words in the host's byte order: 127.x.y.z ends in 7F, ::1 and ::ffff:127.x.y.z in such a last word.
    let loopback = match address.len() {
        8 => address.ends_with("7F"),
        32 => {
            address == "00000000000000000000000001000000"
                || (address.starts_with("0000000000000000FFFF0000") && address.ends_with("7F"))
        }
        _ => return None,
    };
    Some(ListeningSocket {
        port: u16::from_str_radix(port, 16).ok()?,
        loopback,
        inode,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    fn sockets(rows: &[&str]) -> Vec<(u16, bool, u64)> {
        parse(&format!("{HEADER}{}\n", rows.join("\n")))
            .iter()
            .map(|socket| (socket.port, socket.loopback, socket.inode))
            .collect()
    }

    #[test]
    fn parse_ipv4_rows_returns_listeners() {
        let rows = [
            "   0: 00000000:2EE3 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0",
            "   1: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4710 1 0",
            "   2: 0100007F:0051 0100007F:1111 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0",
            "broken",
            "   3: 0:1 0:0 0A",
            "   4: 00000000:2EE4 00000000:0000 0A",
        ];
        assert_eq!(sockets(&rows), [(12003, false, 4711), (80, true, 4710)]);
    }

    #[test]
    fn parse_ipv6_rows_returns_listeners() {
        let rows = [
            "   0: 00000000000000000000000000000000:0016 0:0 0A 0:0 0:0 0 0 0 4713",
            "   1: 00000000000000000000000001000000:0017 0:0 0A 0:0 0:0 0 0 0 4714",
            "   2: 0000000000000000FFFF00000100007F:0018 0:0 0A 0:0 0:0 0 0 0 4715",
        ];
        assert_eq!(
            sockets(&rows),
            [(22, false, 4713), (23, true, 4714), (24, true, 4715)]
        );
    }
}
