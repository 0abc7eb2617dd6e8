//! [`apply`]: lets sockets of the pod's containers use the node's addresses, by the programs of [`crate::cgroup::sockets`].
//!
//! The programs outlive an exchange: a further one replaces those that depend on the addresses.

use crate::cgroup::error::CgroupError;
use crate::cgroup::sockets::{self, Family};
use crate::cgroup::{Cgroup, Hook, Instruction};
use boxlite_proto::names::MAX_HOST_ADDRESSES;
use boxlite_sys::sync::Mutex;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

/// Attached programs.
static ATTACHED: Mutex<BTreeMap<Hook, OwnedFd>> = Mutex::new(BTreeMap::new());

/// Attaches the programs for the node's `addresses`, and for its loopback if `gateway` leads there.
///
/// # Errors
/// The kernel refused a program; those attached before remain.
pub(super) fn apply(addresses: &[Ipv4Addr], gateway: Option<Ipv4Addr>) -> Result<(), CgroupError> {
    let bindable = addresses.iter().filter(|address| !address.is_loopback());
    let bindable: Vec<_> = bindable.copied().take(MAX_HOST_ADDRESSES).collect();
    let mut attached = ATTACHED.lock();
    let mut put = |hook, program: Vec<Instruction>| -> Result<(), CgroupError> {
        let replaced = attached.get(&hook);
        let made = Cgroup::pod().attach_to_sockets(hook, &program, replaced)?;
        attached.insert(hook, made);
        Ok(())
    };
    for family in Family::ALL {
        put(Hook::Bind(family), sockets::bind(family, &bindable))?;
        if let Some(gateway) = gateway {
            put(Hook::Connect(family), sockets::connect(family, gateway))?;
            put(Hook::PeerName(family), sockets::peer_name(family, gateway))?;
        }
    }
    Ok(())
}
