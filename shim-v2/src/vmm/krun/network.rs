//! Step 6: NICs on taps. The module `net` creates the taps in the pod's network namespace, which this process has entered.

use super::ffi::Context;
use crate::vmm::devices::parse_mac;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;

/// virtio-net features that leave checksums and TCP segmentation to the far end in both directions (CSUM, GUEST_CSUM,
/// GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6).
const OFFLOADS: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12;

pub(super) fn configure(context: &Context, spec: &InstanceSpec) -> BoxliteResult<()> {
    for nic in &spec.nics {
        context.add_net_tap(&nic.tap, &parse_mac(&nic.mac)?, OFFLOADS)?;
    }
    Ok(())
}
