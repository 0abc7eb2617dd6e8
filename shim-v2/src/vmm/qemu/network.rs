//! Step 6: network cards on taps that exist already in this process's network namespace.

use super::context::Context;
use crate::net::tap;
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
    Ok(())
}
