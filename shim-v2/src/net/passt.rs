//! The NIC of a pod without CNI, which passt serves: its subnet, passt's command line, and the guest's configuration.
//!
//! passt opens the guest's connections as its own, in the node's network namespace; the IPv4 subnet exists only between guest
//! and passt. It is next to that of [`super::slirp`], for the same reason. IPv6 prefixes are the node's.

use boxlite_proto::boxlite::v1 as wire;

/// MAC address of the NIC. Locally administered; the link has no other station.
pub const MAC: &str = "02:62:78:00:00:02";
/// The guest's address, which passt gives by DHCP.
const ADDRESS: &str = "198.18.254.15";
/// Prefix length of the subnet.
const PREFIX: &str = "24";
/// Address of the default route. Connections to it fail: it is not mapped to the node's loopback.
const GATEWAY: &str = "198.18.254.2";
/// Address whose DNS queries go to the node's first name server. The guest gets it if that server is on the node's loopback.
const NAME_SERVER: &str = "198.18.254.3";
const NAME: &str = "eth0";
/// Option that keeps the guest from the node's loopback. A passt without it lets a guest reach that by crafted frames.
pub const LOOPBACK_OPTION: &str = "--map-host-loopback";

/// Returns the arguments of passt for a VM that is connected to `socket`, an inherited descriptor.
pub fn args(socket: i32) -> Vec<String> {
    let socket = socket.to_string();
    let args = [
        "--foreground",
        "--quiet",
        "--fd",
        &socket,
        "--address",
        ADDRESS,
        "--netmask",
        PREFIX,
        "--gateway",
        GATEWAY,
        "--dns-forward",
        NAME_SERVER,
        // The guest has no use for them.
        "--no-dhcp-search",
        "--no-dhcpv6",
        // No connection to the node's loopback by the gateway's address, and no port of the node leads to the guest.
        "--no-map-gw",
        LOOPBACK_OPTION,
        "none",
        "--tcp-ports",
        "none",
        "--udp-ports",
        "none",
    ];
    args.map(str::to_owned).to_vec()
}

/// Returns the interface for Guest.Init.
pub fn interface() -> wire::Interface {
    wire::Interface {
        name: NAME.to_owned(),
        mac: MAC.to_owned(),
        dhcp: true,
        ..Default::default()
    }
}
