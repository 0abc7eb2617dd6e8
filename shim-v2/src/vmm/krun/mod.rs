//! VmmKind::Krun: libkrun, linked in, on KVM. Eight steps, one file each, run in order by [`KrunVmm`].
//!
//! libkrun takes over its process and exits by `_exit`, so it runs only in the vmm child.

mod context;
mod disks;
mod entrypoint;
mod ffi;
mod instance;
mod kvm;
mod network;
mod resources;
mod shares;
mod vsock;

use super::{Vmm, VmmCapabilities, VmmInstance, devices};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;

/// x86_64 has IRQ lines 5 to 15 for libkrun's virtio-mmio devices. Six are built in: balloon, rng, console, root, share and
/// vsock.
pub const CAPABILITIES: VmmCapabilities = VmmCapabilities {
    max_devices: 11,
    base_devices: 6,
};

/// The libkrun VMM.
pub struct KrunVmm;

impl Vmm for KrunVmm {
    fn create(&mut self, spec: InstanceSpec) -> BoxliteResult<VmmInstance> {
        devices::check(&spec, &CAPABILITIES)?;
        let context = context::create(&spec)?;
        resources::configure(&context, &spec)?;
        entrypoint::configure(&context, &spec)?;
        shares::configure(&context, &spec)?;
        disks::configure(&context, &spec)?;
        let passt = network::configure(&context, &spec)?;
        vsock::configure(&context, &spec)?;
        Ok(instance::create(context, spec, passt))
    }
}
