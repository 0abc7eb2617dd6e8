//! Step 6: network cards on taps that exist already in this process's network namespace; for a pod in the host's network one
//! of user mode.

use super::context::Context;
use crate::net::tap;
use crate::net::user::{GATEWAY, MAC, NAME_SERVER, SUBNET};
use crate::vmm::devices::parse_mac;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::os::fd::AsRawFd;

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    for (index, nic) in spec.nics.iter().enumerate() {
        parse_mac(&nic.mac)?;
        let fd = tap::open(&nic.tap).step(format!("opening the tap {}", nic.tap))?;
        context.option(
            "-netdev",
            format!("tap,id=net{index},fd={}", fd.as_raw_fd()),
        );
        let mtu = nic.mtu;
        context.option(
            "-device",
            format!(
                "virtio-net-device,netdev=net{index},mac={},host_mtu={mtu}",
                nic.mac
            ),
        );
        context.taps.push(fd);
    }
    if spec.host_network {
        // QEMU's own stack, with the host's sockets. Listening is the shim's (`net::host`), so nothing is forwarded here.
        context.option(
            "-netdev",
            format!("user,id=user,ipv6=off,net={SUBNET},host={GATEWAY},dns={NAME_SERVER}"),
        );
        context.option(
            "-device",
            format!("virtio-net-device,netdev=user,mac={MAC}"),
        );
    }
    Ok(())
}
