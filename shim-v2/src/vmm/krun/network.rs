//! Step 6: NICs on taps. The module `net` creates the taps in the pod's network namespace, which this process has entered. A pod
//! without CNI has a NIC that passt serves.

use super::ffi::Context;
use crate::net;
use crate::vmm::devices::parse_mac;
use crate::vmm::passt;
use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::os::fd::OwnedFd;

/// virtio-net features that leave checksums and TCP segmentation to the far end in both directions (CSUM, GUEST_CSUM,
/// GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6). passt terminates the guest's connections and accepts segments of any size.
const OFFLOADS: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;

/// Adds the NICs. Returns a descriptor that shows the end of passt, if the VM has it.
pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<Option<OwnedFd>> {
    for nic in &spec.nics {
        context.add_net_tap(&nic.tap, &parse_mac(&nic.mac)?, OFFLOADS)?;
    }
    if !spec.passt {
        return Ok(None);
    }
    let socket = passt::start(spec)?;
    let watched = socket.try_clone().step("duplicate the socket of passt")?;
    context.add_net_stream(socket, &parse_mac(net::passt::MAC)?, OFFLOADS)?;
    Ok(Some(watched))
}
