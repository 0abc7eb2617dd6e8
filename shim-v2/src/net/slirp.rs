//! The slirp NIC of a pod in the host's network on Qemu: its subnet and the guest's configuration.
//!
//! QEMU opens the guest's connections as its own, in the host's network namespace; the subnet exists only between guest and
//! QEMU. It is taken from the benchmarking range (RFC 2544), which nodes do not route: a routed subnet would be hidden.

use super::{PodInterface, PodNetwork, PodRoute};
use std::net::Ipv4Addr;

/// Subnet with prefix length.
pub const SUBNET: &str = "198.18.255.0/24";
/// QEMU's address in the subnet; connections to it reach the host's loopback.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 2);
/// QEMU's forwarder to the host's name server.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(198, 18, 255, 3);
/// The guest's address with prefix length.
const ADDRESS: &str = "198.18.255.15/24";
/// MAC address of the NIC. Locally administered; the link has no other station.
pub const MAC: &str = "02:62:78:00:00:01";
/// MTU of QEMU's stack in bytes.
const MTU: u32 = 1500;
const NAME: &str = "eth0";

/// Returns the network for Guest.Init.
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
