//! The user-mode card of a pod in the host's network on Qemu: its subnet, and what the guest is told about it.
//!
//! QEMU opens the guest's connections as its own, in the host's network namespace; the subnet exists only between the two.
//! It is one of the range for benchmarks (RFC 2544), which no node routes: a subnet of the node's would hide a real one.

use super::{PodInterface, PodNetwork, PodRoute};
use std::net::Ipv4Addr;

/// The subnet, with its prefix length.
pub const SUBNET: &str = "198.18.255.0/24";
/// QEMU's address in it; connections to it reach the host's loopback.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 2);
/// QEMU's forwarder to the host's name server.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 3);
/// The guest's address, with its prefix length.
const ADDRESS: &str = "198.18.255.15/24";
/// The card's. Locally administered; there is no second one on its wire.
pub const MAC: &str = "02:62:78:00:00:01";
/// What QEMU's stack takes.
const MTU: u32 = 1500;
const NAME: &str = "eth0";

/// For Guest.Init.
pub fn network() -> PodNetwork {
    PodNetwork {
        interfaces: vec![PodInterface {
            name: NAME.to_owned(),
            index: 0,
            mac: MAC.to_owned(),
            mtu: MTU,
            addresses: vec![ADDRESS.to_owned()],
        }],
        routes: vec![PodRoute {
            destination: String::new(),
            gateway: GATEWAY.to_string(),
            interface: NAME.to_owned(),
            source: String::new(),
            scope: 0,
            ipv6: false,
        }],
    }
}
