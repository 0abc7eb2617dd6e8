//! VmmKind::Qemu: a QEMU microvm with the same guest kernel, share, disks, NICs and vsock ports as Krun, emulated (TCG) or
//! on KVM if configured. Built in the same eight steps, one file each.
//!
//! The vmm child remains PID 1 of its namespace with virtiofsd, vhost-device-vsock and QEMU as children. It exits with the
//! first of them, and the kernel then kills the others.

mod context;
mod derived;
mod disks;
mod entrypoint;
mod instance;
mod kernel;
mod network;
mod resources;
mod shares;
mod vsock;

use super::{Vmm, VmmCapabilities, VmmInstance, devices};
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;

/// A microvm without ACPI has 8 virtio-mmio slots. Five are built in: balloon, the agent's disk, console,
/// share and vsock.
pub const CAPABILITIES: VmmCapabilities = VmmCapabilities {
    max_devices: 8,
    base_devices: 5,
};

/// The QEMU VMM.
pub struct QemuVmm;

impl Vmm for QemuVmm {
    fn create(&mut self, spec: InstanceSpec) -> BoxliteResult<VmmInstance> {
        devices::check(&spec, &CAPABILITIES)?;
        let mut context = context::create(&spec)?;
        resources::configure(&mut context, &spec)?;
        entrypoint::configure(&mut context, &spec)?;
        disks::configure(&mut context, &spec)?;
        shares::configure(&mut context, &spec)?;
        network::configure(&mut context, &spec)?;
        vsock::configure(&mut context, &spec)?;
        Ok(instance::create(context, spec))
    }
}
