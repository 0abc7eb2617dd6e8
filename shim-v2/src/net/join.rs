//! Joins a CNI interface with a tap: frames received by one are sent by the other, in both directions, before any stack.
//!
//! tc ingress: a u32 filter that matches everything, with mirred redirect as its action. Unlike with a bridge, the interface
//! keeps its addresses, so CNI's CHECK still finds the configuration of ADD; the namespace's own stack receives no packets and
//! so does not answer in place of the guest.

use super::{NetError, PodInterface, TAP_PREFIX, tap};
use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec};

/// TC_H_MAKE(TC_H_INGRESS, 0): the parent of filters on an ingress qdisc.
const INGRESS: u32 = 0xffff_0000;
/// ETH_P_ALL in network byte order, as tc's header expects it.
const ALL_PROTOCOLS: u16 = 0x0003_u16.to_be();
/// -EEXIST in a netlink answer.
const EXISTS: i32 = -nix::libc::EEXIST;
/// -ENODEV in a netlink answer.
const NO_DEVICE: i32 = -nix::libc::ENODEV;
/// -ENOENT and -EINVAL: the qdisc does not exist.
const NO_QDISC: [i32; 2] = [-nix::libc::ENOENT, -nix::libc::EINVAL];

/// Creates the tap `name` and joins it with `interface`. Idempotent.
///
/// # Errors
/// The kernel's error with the failed step.
pub(super) async fn join(
    handle: &Handle,
    interface: &PodInterface,
    name: &str,
) -> Result<(), NetError> {
    let failed = |step: &'static str, of: &str| {
        let interface = of.to_owned();
        move |source| NetError::Netlink {
            step,
            interface,
            source: Box::new(source),
        }
    };
    let known = index(handle, name).await.map_err(failed("look up", name))?;
    if known.is_none() {
        tap::create(name).map_err(|source| NetError::System {
            step: "create tap",
            source,
        })?;
    }
    let index = index(handle, name).await.map_err(failed("look up", name))?;
    let index = index.ok_or_else(|| NetError::System {
        step: "create tap",
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    let up = LinkUnspec::new_with_index(index)
        .mtu(interface.mtu)
        .up()
        .build();
    handle
        .link()
        .set(up)
        .execute()
        .await
        .map_err(failed("bring up", name))?;

    for (from, to, of) in [
        (interface.index, index, interface.name.as_str()),
        (index, interface.index, name),
    ] {
        let step = failed("add ingress qdisc", of);
        if !qdisc(handle, from).await.map_err(step)? {
            continue;
        }
        let step = failed("add redirect", of);
        redirect(handle, from, to).await.map_err(step)?;
    }
    Ok(())
}

async fn index(handle: &Handle, name: &str) -> Result<Option<u32>, rtnetlink::Error> {
    let mut stream = std::pin::pin!(handle.link().get().match_name(name.to_owned()).execute());
    match stream.try_next().await {
        Ok(message) => Ok(message.map(|message| message.header.index)),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == NO_DEVICE => Ok(None),
        Err(error) => Err(error),
    }
}

/// Adds the ingress qdisc; returns false if it exists, and then its redirect exists too.
async fn qdisc(handle: &Handle, index: u32) -> Result<bool, rtnetlink::Error> {
    match handle
        .qdisc()
        .add(index.cast_signed())
        .ingress()
        .execute()
        .await
    {
        Ok(()) => Ok(true),
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == EXISTS => Ok(false),
        Err(error) => Err(error),
    }
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let filter = handle
        .traffic_filter(from.cast_signed())
        .add()
        .parent(INGRESS)
        .protocol(ALL_PROTOCOLS);
    let done = filter.redirect(to)?.execute().await;
    if done.is_err() {
        // The next attempt would take a qdisc without redirect for a finished one.
        let _kept = unqueue(handle, from).await;
    }
    done
}

async fn unqueue(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut request = handle.qdisc().del(index.cast_signed());
    request.message_mut().header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
    match request.execute().await {
        Err(rtnetlink::Error::NetlinkError(error)) if NO_QDISC.contains(&error.raw_code()) => {
            Ok(())
        }
        done => done,
    }
}

/// Removes our taps and every redirect in the namespace.
///
/// # Errors
/// The kernel's error with the failed step.
pub(super) async fn part(handle: &Handle) -> Result<(), NetError> {
    let failed = |step: &'static str, interface: &str| {
        let interface = interface.to_owned();
        move |source| NetError::Netlink {
            step,
            interface,
            source: Box::new(source),
        }
    };
    let mut links = Vec::new();
    let mut stream = std::pin::pin!(handle.link().get().execute());
    while let Some(message) = stream.try_next().await.map_err(failed("read links", ""))? {
        let name = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
        links.push((message.header.index, name.unwrap_or_default()));
    }
    for (index, name) in links {
        let ours = name
            .strip_prefix(TAP_PREFIX)
            .is_some_and(|rest| rest.parse::<u8>().is_ok());
        if ours {
            handle
                .link()
                .del(index)
                .execute()
                .await
                .map_err(failed("delete", &name))?;
        } else if name != "lo" {
            unqueue(handle, index)
                .await
                .map_err(failed("remove redirect", &name))?;
        }
    }
    Ok(())
}
