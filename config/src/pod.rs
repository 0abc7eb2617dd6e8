//! [`PodDefaults`]: size of a pod's VM if the pod does not say, the `[pod]` section.

use crate::section::{Mistake, Section};
use crate::value;
use std::ops::RangeInclusive;

/// Virtual CPUs of a VM.
pub const VCPUS: RangeInclusive<i64> = 1..=64;
/// Memory for the containers of a pod, in MiB.
pub const MEMORY_MIB: RangeInclusive<i64> = 64..=1 << 20;
/// Memory for guest kernel and agent, in MiB.
const OVERHEAD_MIB: RangeInclusive<i64> = 0..=1 << 16;
/// Scratch disk, in MiB.
const SCRATCH_MIB: RangeInclusive<i64> = 16..=1 << 24;

/// Defaults of a pod's VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodDefaults {
    /// Virtual CPUs of a pod without CPU limit. Default 1: more cost boot time under TCG.
    pub vcpus: u8,
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
}

impl Default for PodDefaults {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 2048,
            overhead_mib: 96,
            scratch_mib: 10240,
            debug_console: false,
        }
    }
}

impl PodDefaults {
    /// Reads the whole section.
    pub fn read(mut section: Section, mistakes: &mut Vec<Mistake>) -> Self {
        let default = Self::default();
        let range = |range: RangeInclusive<i64>| {
            move |v: &toml::Value| value::number(v, *range.start(), *range.end())
        };
        let pod = Self {
            vcpus: section.take("vcpus", default.vcpus, |v| {
                value::number(v, *VCPUS.start(), *VCPUS.end())
            }),
            memory_mib: section.take("memory_mib", default.memory_mib, range(MEMORY_MIB)),
            overhead_mib: section.take("overhead_mib", default.overhead_mib, range(OVERHEAD_MIB)),
            scratch_mib: section.take("scratch_mib", default.scratch_mib, range(SCRATCH_MIB)),
            debug_console: section.take("debug_console", default.debug_console, value::boolean),
        };
        section.finish(mistakes);
        pod
    }
}
