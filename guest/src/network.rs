//! Configures the pod's NIC with the name, addresses and routes that the host took over from CNI.
//!
//! The NIC is found by its MAC address. The tap behind it replaces the plugin's interface on the host, so the
//! addresses already belong to the pod: no DHCP and no duplicate address detection (the host's own copy would
//! respond). A NIC without CNI gets its IPv4 configuration by DHCP, and the kernel configures IPv6 by router
//! advertisements. Called once by `Guest.Init`.

use crate::dhcp::{self, DhcpError, Lease};
use crate::resolv_conf;
use boxlite_proto::boxlite::v1::{Interface, Route};
use futures::TryStreamExt;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tokio_util::task::AbortOnDropHandle;

/// An error in configuring the network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No netlink socket could be opened.
    #[error("failed to open a netlink socket")]
    Socket(#[source] std::io::Error),
    /// A field of the request is invalid.
    #[error("invalid {field} {value:?}: {reason}")]
    Invalid {
        field: &'static str,
        value: String,
        reason: &'static str,
    },
    /// No NIC has that MAC address.
    #[error("NIC with MAC address {mac} not found; present: {present}")]
    NoCard { mac: String, present: String },
    /// The NIC got no address.
    #[error(transparent)]
    Dhcp(#[from] DhcpError),
    /// The name servers could not be written.
    #[error("failed to write the pod's resolv.conf")]
    ResolvConf(#[source] std::io::Error),
    /// The kernel rejected a step.
    #[error("failed to {step}")]
    Step {
        step: String,
        #[source]
        source: rtnetlink::Error,
    },
}

/// Sets up the loopback, then interfaces, then routes, in the given order.
///
/// If the future is dropped, the network is partially configured; another call completes it.
pub(crate) async fn configure(
    interfaces: &[Interface],
    routes: &[Route],
) -> Result<(), NetworkError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    apply(&handle, interfaces, routes).await
}

async fn apply(
    handle: &Handle,
    interfaces: &[Interface],
    routes: &[Route],
) -> Result<(), NetworkError> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|source| step("list NICs", source))?;
    if let Some(loopback) = links.iter().find(|link| name_of(link) == Some("lo")) {
        let up = LinkUnspec::new_with_index(loopback.header.index)
            .up()
            .build();
        handle
            .link()
            .set(up)
            .execute()
            .await
            .map_err(|source| step("set the loopback up", source))?;
    }
    let mut indexes = HashMap::new();
    for interface in interfaces {
        let index = find(&links, interface)?;
        set_up(handle, index, interface).await?;
        if interface.dhcp {
            let lease = dhcp::lease(&interface.name, parse_mac(&interface.mac)?).await?;
            apply_lease(handle, index, &interface.name, &lease).await?;
        }
        indexes.insert(interface.name.as_str(), index);
    }
    for route in routes {
        let message = route_message(route, &indexes)?;
        let what = || {
            format!(
                "add route {} via {:?} dev {}",
                destination_of(route),
                route.gateway,
                route.interface
            )
        };
        // Routes exist already if Init is repeated.
        handle
            .route()
            .add(message)
            .replace()
            .execute()
            .await
            .map_err(|source| step(what(), source))?;
    }
    Ok(())
}

async fn set_up(handle: &Handle, index: u32, interface: &Interface) -> Result<(), NetworkError> {
    let name = &interface.name;
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('/') {
        return Err(invalid(
            "interface name",
            name,
            "not a valid interface name",
        ));
    }
    // An interface can be renamed only while it is down.
    let mut link = LinkUnspec::new_with_index(index).name(name.clone());
    if !interface.boot_mac.is_empty() {
        link = link.address(parse_mac(&interface.mac)?.to_vec());
    }
    if interface.mtu != 0 {
        link = link.mtu(interface.mtu);
    }
    handle
        .link()
        .set(link.build())
        .execute()
        .await
        .map_err(|source| step(format!("rename NIC to {name}"), source))?;
    for address in &interface.addresses {
        let (ip, prefix) = parse_cidr("address", address)?;
        let mut request = handle.address().add(index, ip, prefix).replace();
        if ip.is_ipv6() {
            let message = request.message_mut();
            message.attributes.push(AddressAttribute::Flags(
                AddressFlags::Nodad | AddressFlags::Permanent,
            ));
        }
        request
            .execute()
            .await
            .map_err(|source| step(format!("add address {address} to {name}"), source))?;
    }
    let up = LinkUnspec::new_with_index(index).up().build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(|source| step(format!("set {name} up"), source))
}

/// Configures a NIC by a lease.
async fn apply_lease(
    handle: &Handle,
    index: u32,
    name: &str,
    lease: &Lease,
) -> Result<(), NetworkError> {
    let (address, prefix) = (lease.address, lease.prefix);
    let request = handle.address().add(index, address.into(), prefix);
    let added = request.replace().execute().await;
    added.map_err(|source| step(format!("add address {address}/{prefix} to {name}"), source))?;
    if lease.mtu != 0 {
        let link = LinkUnspec::new_with_index(index).mtu(lease.mtu).build();
        let set = handle.link().set(link).execute().await;
        set.map_err(|source| step(format!("set the MTU of {name} to {}", lease.mtu), source))?;
    }
    if let Some(gateway) = lease.gateway {
        let route = Route {
            gateway: gateway.to_string(),
            interface: name.to_owned(),
            ..Route::default()
        };
        let message = route_message(&route, &HashMap::from([(name, index)]))?;
        let added = handle.route().add(message).replace().execute().await;
        added.map_err(|source| step(format!("add default route via {gateway}"), source))?;
    }
    resolv_conf::write(&lease.name_servers).map_err(NetworkError::ResolvConf)
}

/// Returns the index of the interface's NIC, by its MAC address, or by the one it booted with.
fn find(links: &[LinkMessage], interface: &Interface) -> Result<u32, NetworkError> {
    let wanted = &interface.mac;
    let with = |mac: Vec<u8>| {
        let has = |link: &&LinkMessage| {
            link.attributes
                .iter()
                .any(|attribute| matches!(attribute, LinkAttribute::Address(own) if *own == mac))
        };
        links.iter().find(has)
    };
    let mut found = with(parse_mac(wanted)?.to_vec());
    if found.is_none() && !interface.boot_mac.is_empty() {
        found = with(parse_mac(&interface.boot_mac)?.to_vec());
    }
    match found {
        Some(link) => Ok(link.header.index),
        None => {
            let present: Vec<_> = links.iter().filter_map(name_of).collect();
            Err(NetworkError::NoCard {
                mac: wanted.to_owned(),
                present: present.join(", "),
            })
        }
    }
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

fn parse_mac(text: &str) -> Result<[u8; 6], NetworkError> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| u8::from_str_radix(part, 16).ok())
        .collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| invalid("MAC", text, "expected aa:bb:cc:dd:ee:ff"))
}

fn parse_cidr(field: &'static str, text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let parsed = text
        .split_once('/')
        .and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse::<u8>().ok()?)));
    match parsed {
        Some((ip @ IpAddr::V4(_), prefix)) if prefix <= 32 => Ok((ip, prefix)),
        Some((ip @ IpAddr::V6(_), prefix)) if prefix <= 128 => Ok((ip, prefix)),
        _ => Err(invalid(
            field,
            text,
            "expected an address and a prefix length",
        )),
    }
}

fn destination_of(route: &Route) -> &str {
    if route.destination.is_empty() {
        "default"
    } else {
        &route.destination
    }
}

/// Builds the netlink message of a route.
fn route_message(
    route: &Route,
    indexes: &HashMap<&str, u32>,
) -> Result<RouteMessage, NetworkError> {
    let index = match indexes.get(route.interface.as_str()) {
        Some(index) => *index,
        None => {
            return Err(invalid(
                "route interface",
                &route.interface,
                "not among the interfaces",
            ));
        }
    };
    let gateway = match route.gateway.as_str() {
        "" => None,
        text => Some(
            text.parse::<IpAddr>()
                .map_err(|_| invalid("gateway", text, "not an address"))?,
        ),
    };
    let source = match route.source.as_str() {
        "" => None,
        text => Some(
            text.parse::<IpAddr>()
                .map_err(|_| invalid("route source", text, "not an address"))?,
        ),
    };
    let ipv6 = route.ipv6 || gateway.is_some_and(|ip| ip.is_ipv6());
    let (destination, prefix) = match (route.destination.as_str(), ipv6) {
        ("" | "default", true) => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
        ("" | "default", false) => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        (text, _) => parse_cidr("route destination", text)?,
    };
    let mixed = || invalid("route", destination_of(route), "mixes IPv4 and IPv6");
    let scope = u8::try_from(route.scope)
        .map(RouteScope::from)
        .unwrap_or(RouteScope::Universe);
    let mut builder = RouteMessageBuilder::<IpAddr>::new().output_interface(index);
    builder = builder
        .destination_prefix(destination, prefix)
        .map_err(|_| mixed())?;
    if let Some(source) = source {
        builder = builder.pref_source(source).map_err(|_| mixed())?;
    }
    builder = match gateway {
        // Gateways outside all subnets (as in ptp and calico) are on the link; the flag is harmless for others.
        Some(gateway) => builder.gateway(gateway).map_err(|_| mixed())?.onlink(),
        None => builder,
    };
    let scope = match scope {
        RouteScope::Universe if gateway.is_none() && !destination.is_ipv6() => RouteScope::Link,
        other => other,
    };
    Ok(builder.scope(scope).build())
}

fn step(step: impl Into<String>, source: rtnetlink::Error) -> NetworkError {
    NetworkError::Step {
        step: step.into(),
        source,
    }
}

fn invalid(field: &'static str, value: &str, reason: &'static str) -> NetworkError {
    NetworkError::Invalid {
        field,
        value: value.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, gateway: &str, ipv6: bool) -> Route {
        Route {
            destination: destination.into(),
            gateway: gateway.into(),
            interface: "eth0".into(),
            source: String::new(),
            scope: 0,
            ipv6,
        }
    }

    #[test]
    fn route_message_without_destination_is_default() {
        let indexes = HashMap::from([("eth0", 2)]);
        let four = route_message(&route("", "10.0.0.1", false), &indexes).unwrap();
        assert_eq!(four.header.destination_prefix_length, 0);
        assert_eq!(
            four.header.address_family,
            netlink_packet_route::AddressFamily::Inet
        );
        let six = route_message(&route("", "fe80::1", false), &indexes).unwrap();
        assert_eq!(
            six.header.address_family,
            netlink_packet_route::AddressFamily::Inet6
        );
    }

    #[test]
    fn route_message_without_gateway_has_link_scope() {
        let indexes = HashMap::from([("eth0", 2)]);
        let message = route_message(&route("169.254.1.1/32", "", false), &indexes).unwrap();
        assert_eq!(message.header.scope, RouteScope::Link);
        assert_eq!(message.header.destination_prefix_length, 32);
    }

    #[test]
    fn parse_invalid_values_are_rejected() {
        let indexes = HashMap::from([("eth0", 2)]);
        assert!(route_message(&route("10.0.0.0/33", "", false), &indexes).is_err());
        assert!(route_message(&route("fd00::/64", "10.0.0.1", true), &indexes).is_err());
        assert!(route_message(&route("", "nowhere", false), &indexes).is_err());
        assert!(route_message(&route("", "10.0.0.1", false), &HashMap::new()).is_err());
        assert!(parse_mac("aa:bb:cc:dd:ee").is_err());
        assert!(parse_mac("aa:bb:cc:dd:ee:fg").is_err());
        assert_eq!(
            parse_mac("0a:bb:cc:dd:ee:ff").unwrap(),
            [0x0a, 0xbb, 0xcc, 0xdd, 0xee, 0xff]
        );
    }
}
