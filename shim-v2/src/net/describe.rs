//! Reads the CNI configuration of the current network namespace: links, addresses, routes.
//!
//! Read-only. Routes that the kernel derives from addresses are omitted: the guest's kernel derives them too.

use super::{NetError, PodInterface, PodNetwork, PodRoute, TAP_PREFIX};
use futures::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Length of an Ethernet address in bytes.
const MAC_BYTES: usize = 6;

fn failed(step: &'static str, interface: &str) -> impl FnOnce(rtnetlink::Error) -> NetError {
    move |source| NetError::Netlink {
        step,
        interface: interface.to_owned(),
        source: Box::new(source),
    }
}

/// Reads the whole namespace except loopback and our taps.
pub(super) async fn read(handle: &Handle) -> Result<PodNetwork, NetError> {
    let mut interfaces = links(handle).await?;
    addresses(handle, &mut interfaces).await?;
    let mut routes = Vec::new();
    let queries = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    for (query, ipv6) in queries.into_iter().zip([false, true]) {
        let mut stream = std::pin::pin!(handle.route().get(query).execute());
        while let Some(message) = stream.try_next().await.map_err(failed("read routes", ""))? {
            routes.extend(route(&message, &interfaces, ipv6));
        }
    }
    // A gateway must be reachable when its route is added, so on-link routes come first.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok(PodNetwork { interfaces, routes })
}

async fn links(handle: &Handle) -> Result<Vec<PodInterface>, NetError> {
    let mut interfaces = Vec::new();
    let mut stream = std::pin::pin!(handle.link().get().execute());
    while let Some(message) = stream.try_next().await.map_err(failed("read links", ""))? {
        if message.header.flags.contains(LinkFlags::Loopback) {
            continue;
        }
        let mut interface = PodInterface {
            name: String::new(),
            index: message.header.index,
            mac: String::new(),
            mtu: 0,
            addresses: Vec::new(),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => interface.name = name,
                LinkAttribute::Mtu(mtu) => interface.mtu = mtu,
                LinkAttribute::Address(bytes) if bytes.len() == MAC_BYTES => {
                    let octets: Vec<String> =
                        bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                    interface.mac = octets.join(":");
                }
                _ => {}
            }
        }
        let is_tap = interface
            .name
            .strip_prefix(TAP_PREFIX)
            .is_some_and(|rest| rest.parse::<u8>().is_ok());
        // Tunnels that the kernel adds to every namespace (tunl0, sit0 …) have no Ethernet address.
        if !interface.mac.is_empty() && !is_tap && message.header.flags.contains(LinkFlags::Up) {
            interfaces.push(interface);
        }
    }
    interfaces.sort_by_key(|interface| interface.index);
    Ok(interfaces)
}

async fn addresses(handle: &Handle, interfaces: &mut [PodInterface]) -> Result<(), NetError> {
    let mut stream = std::pin::pin!(handle.address().get().execute());
    while let Some(message) = stream
        .try_next()
        .await
        .map_err(failed("read addresses", ""))?
    {
        let Some(interface) = interfaces
            .iter_mut()
            .find(|interface| interface.index == message.header.index)
        else {
            continue;
        };
        let mut found = None;
        for attribute in message.attributes {
            match attribute {
                // On a point-to-point link Address is the peer's, and Local is present and is ours.
                AddressAttribute::Local(address) => found = Some(address),
                AddressAttribute::Address(address) => found = found.or(Some(address)),
                _ => {}
            }
        }
        match found {
            // The guest derives its own from the same MAC.
            Some(IpAddr::V6(address)) if address.is_unicast_link_local() => {}
            Some(address) => interface
                .addresses
                .push(format!("{address}/{}", message.header.prefix_len)),
            None => {}
        }
    }
    Ok(())
}

fn address(from: &RouteAddress) -> Option<IpAddr> {
    match from {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// Returns None for routes that the guest's kernel derives, and for other tables and interfaces.
fn route(message: &RouteMessage, interfaces: &[PodInterface], ipv6: bool) -> Option<PodRoute> {
    let header = &message.header;
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
    {
        return None;
    }
    let mut route = PodRoute {
        destination: String::new(),
        gateway: String::new(),
        interface: String::new(),
        source: String::new(),
        scope: u32::from(u8::from(header.scope)),
        ipv6,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                route.destination =
                    format!("{}/{}", address(to)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(gateway) => route.gateway = address(gateway)?.to_string(),
            RouteAttribute::PrefSource(source) => route.source = address(source)?.to_string(),
            RouteAttribute::Oif(index) => {
                route.interface = interfaces
                    .iter()
                    .find(|interface| interface.index == *index)?
                    .name
                    .clone();
            }
            _ => {}
        }
    }
    if route.interface.is_empty() {
        None
    } else {
        Some(route)
    }
}
