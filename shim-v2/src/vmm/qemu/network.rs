//! Step 6: NICs on existing taps in this process's network namespace; a slirp NIC for a pod in the host's network; a
//! NIC that passt serves for a pod without CNI.

use super::context::Context;
use crate::net::slirp::{GATEWAY, MAC, NAME_SERVER, SUBNET};
use crate::net::{self, tap};
use crate::vmm::devices::parse_mac;
use crate::vmm::passt;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::os::fd::AsRawFd;

pub(super) fn configure(context: &mut Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    for (index, nic) in spec.nics.iter().enumerate() {
        parse_mac(&nic.mac)?;
        let fd = tap::open(&nic.tap).step(format!("open tap {}", nic.tap))?;
        context.option(
            "-netdev",
            format!("tap,id=net{index},fd={}", fd.as_raw_fd()),
        );
        // With host_mtu the guest cannot raise the MTU later.
        let mtu = match nic.mtu {
            0 => String::new(),
            mtu => format!(",host_mtu={mtu}"),
        };
        context.option(
            "-device",
            format!("virtio-net-device,netdev=net{index},mac={}{mtu}", nic.mac),
        );
        context.nics.push(fd);
    }
    if spec.passt {
        let socket = passt::start(spec)?;
        context.option(
            "-netdev",
            format!(
                "stream,id=passt,addr.type=fd,addr.str={}",
                socket.as_raw_fd()
            ),
        );
        context.option(
            "-device",
            format!("virtio-net-device,netdev=passt,mac={}", net::passt::MAC),
        );
        context.nics.push(socket);
    }
    if spec.host_network {
        // QEMU's own stack on the host's sockets. The shim binds ports (`net::host`), so nothing is forwarded here.
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
