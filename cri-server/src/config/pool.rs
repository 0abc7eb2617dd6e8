//! `[pool]`: warm VMs. Keys and defaults only; [`boxlite_runtime::pool`] has the policy.

use super::Mistake;
use boxlite_config::section::Section;
use boxlite_config::value;
use std::fmt;
use std::time::Duration;
use toml::Value;

/// Most VMs that may wait, far more than a node starts at once.
const MAX_SIZE: i64 = 1024;
/// Largest amount of memory in MiB, 16 TiB.
const MAX_MIB: i64 = 1 << 24;
/// vCPUs of a shape, as those of a pod.
const MAX_VCPUS: u8 = 64;

/// Warm VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PoolConfig {
    /// Number of VMs. Default 0, which turns the pool off: waiting VMs take memory that no pod requested, and it is not
    /// charged to the pod later (docs/decisions/0028-warm-pool.md).
    pub size: usize,
    /// Host memory that the waiting VMs may use together, in MiB. Default 1024: five to twelve VMs.
    pub memory_mib: u64,
    /// Available memory of the node below which waiting VMs are removed, in MiB. Default 1024, far above the 100 MiB at
    /// which the kubelet begins to evict.
    pub min_available_mib: u64,
    /// Time without a pod start after which the pool is filled. Default 2 s: a burst of pods is not slowed down.
    pub idle: Duration,
    /// Shapes to keep. Default none: the shapes of recent pods.
    pub shapes: Vec<PodShape>,
}

/// vCPUs, and memory for the containers in MiB, written as `1x2048`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PodShape {
    pub vcpus: u8,
    pub memory_mib: u32,
}

impl fmt::Display for PodShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.vcpus, self.memory_mib)
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            size: 0,
            memory_mib: 1024,
            min_available_mib: 1024,
            idle: Duration::from_secs(2),
            shapes: Vec::new(),
        }
    }
}

impl PoolConfig {
    pub(super) fn read(mut section: Section, mistakes: &mut Vec<Mistake>) -> Self {
        let default = Self::default();
        let mib = |v: &Value| value::number(v, 1, MAX_MIB);
        let pool = Self {
            size: section.take("size", default.size, |v| value::number(v, 0, MAX_SIZE)),
            memory_mib: section.take("memory_mib", default.memory_mib, mib),
            min_available_mib: section.take("min_available_mib", default.min_available_mib, mib),
            idle: section.take("idle_seconds", default.idle, value::seconds),
            shapes: section.take("shapes", default.shapes, shapes),
        };
        section.finish(mistakes);
        pool
    }
}

fn shapes(value: &Value) -> Result<Vec<PodShape>, String> {
    let list = value.as_array().ok_or("must be a list of strings")?;
    list.iter()
        .map(|entry| {
            let text = value::text(entry)?;
            shape(text).ok_or_else(|| {
                format!(
                    "{text:?} is not a shape: vCPUs from 1 to {MAX_VCPUS}, x, MiB, such as 1x2048"
                )
            })
        })
        .collect()
}

fn shape(text: &str) -> Option<PodShape> {
    let (vcpus, memory) = text.split_once('x')?;
    let (vcpus, memory_mib) = (vcpus.parse().ok()?, memory.parse().ok()?);
    let valid = (1..=MAX_VCPUS).contains(&vcpus) && (1..=MAX_MIB).contains(&i64::from(memory_mib));
    valid.then_some(PodShape { vcpus, memory_mib })
}
