//! [`PodDefaults`]: size of a pod's VM if the pod does not say, the `[pod]` section.

use crate::section::{Mistake, Section};
use crate::value;
use boxlite_proto::vmm::{Acceleration, IdRange, SharedVolumeWriters};
use std::ops::RangeInclusive;

/// Virtual CPUs of a VM.
pub const VCPUS: RangeInclusive<i64> = 1..=64;
/// Maximum number of vCPUs of a pod that does not say. Each costs the guest its per-CPU memory and the host a thread.
const MAX_AUTOMATIC_VCPUS: u8 = 4;
/// Memory for the containers of a pod, in MiB.
pub const MEMORY_MIB: RangeInclusive<i64> = 64..=1 << 20;
/// Memory for guest kernel and agent, in MiB.
const OVERHEAD_MIB: RangeInclusive<i64> = 0..=1 << 16;
/// Scratch disk, in MiB.
const SCRATCH_MIB: RangeInclusive<i64> = 16..=1 << 24;

/// Defaults of a pod's VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodDefaults {
    /// Virtual CPUs of a pod without CPU limit. Default: see [`Self::for_node`].
    pub vcpus: Option<u8>,
    /// Memory in MiB for the containers of a pod without memory limit. Default 2048, at most the node's: untouched memory
    /// costs the host nothing but the guest's page structures.
    pub memory_mib: u32,
    /// Memory in MiB added for guest kernel and agent, beside a part that grows with the VM ([`crate::budget`]). Default 96:
    /// kernel image 22, idle kernel and agent 54 (measured), and a reserve.
    pub overhead_mib: u32,
    /// Sparse scratch disk in MiB, which holds the writable layers. Default 10240.
    pub scratch_mib: u32,
    /// Kernel messages in the console log. Default false: they cost boot time.
    pub debug_console: bool,
    /// Reaction to a second pod that mounts a host directory with write access. Default warn: most directories that pods
    /// share are not guarded by file locks, and a rolling update runs two pods on one volume.
    pub shared_volume_writers: SharedVolumeWriters,
    /// User ids of the VMs. Default [`IdRange::DEFAULT`]; `None`: VMs run as root.
    pub vmm_ids: Option<IdRange>,
}

impl Default for PodDefaults {
    fn default() -> Self {
        Self {
            vcpus: None,
            memory_mib: 2048,
            overhead_mib: 96,
            scratch_mib: 10240,
            debug_console: false,
            shared_volume_writers: SharedVolumeWriters::Warn,
            vmm_ids: Some(IdRange::DEFAULT),
        }
    }
}

impl PodDefaults {
    /// Returns the defaults with the number of vCPUs decided: on KVM as many as the node has, at most
    /// `MAX_AUTOMATIC_VCPUS`. With TCG one, since the guest's CPUs share one thread and more only cost boot time.
    #[must_use]
    pub fn for_node(self, acceleration: Acceleration) -> Self {
        let node = std::thread::available_parallelism().map_or(1, usize::from);
        let automatic = match acceleration {
            Acceleration::Kvm => u8::try_from(node).unwrap_or(u8::MAX),
            Acceleration::Tcg => 1,
        };
        Self {
            vcpus: self.vcpus.or(Some(automatic.min(MAX_AUTOMATIC_VCPUS))),
            ..self
        }
    }

    /// Reads the whole section.
    pub fn read(mut section: Section, mistakes: &mut Vec<Mistake>) -> Self {
        let default = Self::default();
        let range = |range: RangeInclusive<i64>| {
            move |v: &toml::Value| value::number(v, *range.start(), *range.end())
        };
        let pod = Self {
            vcpus: section.take("vcpus", default.vcpus, |v| match v.as_str() {
                Some("auto") => Ok(None),
                _ => value::number(v, *VCPUS.start(), *VCPUS.end()).map(Some),
            }),
            memory_mib: section.take("memory_mib", default.memory_mib, range(MEMORY_MIB)),
            overhead_mib: section.take("overhead_mib", default.overhead_mib, range(OVERHEAD_MIB)),
            scratch_mib: section.take("scratch_mib", default.scratch_mib, range(SCRATCH_MIB)),
            debug_console: section.take("debug_console", default.debug_console, value::boolean),
            shared_volume_writers: section.take(
                "shared_volume_writers",
                default.shared_volume_writers,
                value::shared_volume_writers,
            ),
            vmm_ids: section.take("vmm_ids", default.vmm_ids, value::vmm_ids),
        };
        section.finish(mistakes);
        pod
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_node_decides_on_vcpus_once() {
        let auto = PodDefaults::default();
        assert_eq!(auto.for_node(Acceleration::Tcg).vcpus, Some(1));
        let kvm = auto.for_node(Acceleration::Kvm).vcpus;
        assert!(
            kvm.is_some_and(|n| (1..=MAX_AUTOMATIC_VCPUS).contains(&n)),
            "{kvm:?}"
        );
        let fixed = PodDefaults {
            vcpus: Some(9),
            ..auto
        };
        assert_eq!(fixed.for_node(Acceleration::Tcg), fixed);
    }
}
