//! Memory budget of a pod: guest, containers, and the VM's processes on the host. docs/resources.md has the measurements.
//!
//! ```text
//! VM's RAM       = containers' limit + guest
//! host processes = VM's RAM + VMM
//! ```

use crate::pod::PodDefaults;
use boxlite_proto::vmm::{Acceleration, VmmKind};

/// Part of the containers' memory that the guest's kernel needs in addition: page structures (1/64), hash tables, watermarks.
/// Measured: a VM of 1088 MiB has 19 MiB less for use than its size lets one of 96 MiB expect.
const CONTAINERS_PER_KERNEL: u64 = 32;
/// Size of QEMU's buffer of translated code, in MiB: with 32 the calls of a pod take several times as long (docs/performance.md).
/// QEMU's default is an eighth of the host's memory, at most 1 GiB.
pub const TCG_BUFFER_MIB: u64 = 128;
/// QEMU without guest memory and translated code, virtiofsd, vhost-device-vsock and the shim, in MiB.
const QEMU_MIB: u64 = 128;
/// libkrun without guest memory, and the shim, in MiB.
const KRUN_MIB: u64 = 128;

/// passt, in MiB: its tables of flows and its buffers have a fixed size.
pub const PASST_MIB: u64 = 24;

/// Returns the memory that the guest's kernel and agent need beside `pod_mib` for containers.
pub fn guest_mib(pod_mib: u64, defaults: &PodDefaults) -> u64 {
    u64::from(defaults.overhead_mib) + pod_mib / CONTAINERS_PER_KERNEL
}

/// Returns the memory for containers in a VM of `vm_mib`: the inverse of [`guest_mib`].
pub fn containers_mib(vm_mib: u64, defaults: &PodDefaults) -> u64 {
    let scaled = vm_mib.saturating_sub(u64::from(defaults.overhead_mib));
    (scaled + 1) * CONTAINERS_PER_KERNEL / (CONTAINERS_PER_KERNEL + 1)
}

/// Returns the memory that the VM's processes on the host need beside the VM's RAM.
pub fn vmm_mib(kind: &VmmKind, acceleration: Acceleration) -> u64 {
    match (kind, acceleration) {
        (VmmKind::Krun, _) => KRUN_MIB,
        (VmmKind::Qemu, Acceleration::Kvm) => QEMU_MIB,
        (VmmKind::Qemu, Acceleration::Tcg) => QEMU_MIB + TCG_BUFFER_MIB,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn guest_need_grows_with_the_vm() {
        let of = |pod| guest_mib(pod, &PodDefaults::default());
        assert_eq!((of(32), of(256), of(1024)), (97, 104, 128));
        assert_eq!((of(2048), of(16384)), (160, 608));
    }

    proptest! {
        #[test]
        fn containers_fit_the_vm_made_for_them(pod in 1u64..1 << 22, overhead in 0u32..1 << 12) {
            let defaults = PodDefaults { overhead_mib: overhead, ..PodDefaults::default() };
            let vm = pod + guest_mib(pod, &defaults);
            prop_assert_eq!(containers_mib(vm, &defaults), pod);
        }

        #[test]
        fn containers_never_exceed_the_vm(vm: u32, overhead: u16) {
            let defaults = PodDefaults { overhead_mib: overhead.into(), ..PodDefaults::default() };
            prop_assert!(containers_mib(vm.into(), &defaults) <= vm.into());
        }
    }
}
