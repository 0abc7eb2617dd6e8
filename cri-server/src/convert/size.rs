//! How big a pod's VM is: vCPUs and memory from the pod's resources, overhead and the configured defaults.
//!
//! Reads one number of the host: the pod cgroup's memory limit, to refuse a VM that the kernel would kill.

use super::ConvertError;
use crate::config::PodDefaults;
use boxlite_proto::cri::v1::{LinuxContainerResources, LinuxPodSandboxConfig};
use std::path::Path;

const MIB: u64 = 1 << 20;
/// Default period of the CPU quota in µs, as the kernel and the kubelet have it.
const PERIOD: i64 = 100_000;
/// Most vCPUs a pod gets.
const VCPU_LIMIT: i64 = 64;
/// cgroup v1 writes "no limit" as the largest multiple of a page; everything from an exbibyte up is none.
const NO_LIMIT: u64 = 1 << 60;

/// Size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Memory in MiB, overhead included.
    pub memory_mib: u32,
}

/// The size for a pod; `limit` is its cgroup's memory limit in bytes, where known.
pub fn vm_size(
    linux: Option<&LinuxPodSandboxConfig>,
    defaults: &PodDefaults,
    limit: Option<u64>,
) -> Result<VmSize, ConvertError> {
    let resources = linux.and_then(|linux| linux.resources.as_ref());
    let overhead = linux.and_then(|linux| linux.overhead.as_ref());
    let pod_mib = memory_mib(resources).unwrap_or(u64::from(defaults.memory_mib));
    let overhead_mib = memory_mib(overhead)
        .unwrap_or(0)
        .max(u64::from(defaults.overhead_mib));
    let vm_mib = pod_mib.saturating_add(overhead_mib);
    if let Some(limit) = limit.filter(|limit| *limit < vm_mib.saturating_mul(MIB)) {
        return Err(ConvertError::TooSmall {
            vm_mib,
            pod_mib,
            overhead_mib,
            limit_mib: limit / MIB,
            cgroup: linux
                .map(|linux| linux.cgroup_parent.clone())
                .unwrap_or_default(),
        });
    }
    let memory_mib = u32::try_from(vm_mib).map_err(|_| {
        ConvertError::invalid(
            "linux.resources.memory_limit_in_bytes",
            vm_mib.to_string(),
            "MiB are more than a VM can have",
        )
    })?;
    Ok(VmSize {
        vcpus: vcpus(resources).unwrap_or(defaults.vcpus),
        memory_mib,
    })
}

/// Rounded up; `None` for no limit.
fn memory_mib(resources: Option<&LinuxContainerResources>) -> Option<u64> {
    let bytes = u64::try_from(resources?.memory_limit_in_bytes).ok()?;
    (bytes > 0).then(|| bytes.div_ceil(MIB))
}

/// The CPU limit rounded up; `None` for no limit.
fn vcpus(resources: Option<&LinuxContainerResources>) -> Option<u8> {
    let resources = resources?;
    if resources.cpu_quota <= 0 {
        return None;
    }
    let period = period(resources);
    let count = resources.cpu_quota / period + i64::from(resources.cpu_quota % period > 0);
    u8::try_from(count.clamp(1, VCPU_LIMIT)).ok()
}

/// What an update may ask for: a VM does not grow while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    vm_mib: u64,
    overhead_mib: u64,
    vcpus: u8,
}

impl Room {
    /// The room in a VM that was made with `size` for a pod with this overhead.
    pub fn of(
        size: VmSize,
        overhead: Option<&LinuxContainerResources>,
        defaults: &PodDefaults,
    ) -> Self {
        Self {
            vm_mib: u64::from(size.memory_mib),
            overhead_mib: memory_mib(overhead)
                .unwrap_or(0)
                .max(u64::from(defaults.overhead_mib)),
            vcpus: size.vcpus,
        }
    }

    /// Refuses what does not fit, with the arithmetic. What is asked for no more than `now` already has is let through:
    /// a pod without limits may have a container whose limit is above its VM's size.
    pub fn admit(
        &self,
        wish: &LinuxContainerResources,
        now: Option<&LinuxContainerResources>,
    ) -> Result<(), ConvertError> {
        let (had_mib, had_cpus) = (memory_mib(now).unwrap_or(0), thousandths(now).unwrap_or(0));
        let Self {
            vm_mib,
            overhead_mib,
            vcpus,
        } = *self;
        let room_mib = vm_mib.saturating_sub(overhead_mib);
        if let Some(wanted_mib) = memory_mib(Some(wish))
            && wanted_mib > room_mib
            && wanted_mib > had_mib
        {
            return Err(ConvertError::Beyond(format!(
                "memory_limit_in_bytes = {} is {wanted_mib} MiB, and the pod's VM has {room_mib} MiB for containers ({vm_mib} MiB - {overhead_mib} MiB overhead)",
                wish.memory_limit_in_bytes
            )));
        }
        if let Some(wanted) = thousandths(Some(wish))
            && wanted > i64::from(vcpus) * 1000
            && wanted > had_cpus
        {
            return Err(ConvertError::Beyond(format!(
                "cpu_quota = {} in a period of {} is {}.{:03} CPUs, and the pod's VM has {vcpus}",
                wish.cpu_quota,
                period(wish),
                wanted / 1000,
                wanted % 1000
            )));
        }
        Ok(())
    }
}

/// The CPU limit in thousandths of a CPU; `None` for no limit.
fn thousandths(resources: Option<&LinuxContainerResources>) -> Option<i64> {
    let resources = resources?;
    (resources.cpu_quota > 0).then(|| resources.cpu_quota.saturating_mul(1000) / period(resources))
}

fn period(resources: &LinuxContainerResources) -> i64 {
    if resources.cpu_period > 0 {
        resources.cpu_period
    } else {
        PERIOD
    }
}

/// Brings an update into what was: a field that it leaves at zero keeps its value.
pub fn merge(have: &mut LinuxContainerResources, update: &LinuxContainerResources) {
    for (old, new) in [
        (&mut have.cpu_period, update.cpu_period),
        (&mut have.cpu_quota, update.cpu_quota),
        (&mut have.cpu_shares, update.cpu_shares),
        (
            &mut have.memory_limit_in_bytes,
            update.memory_limit_in_bytes,
        ),
        (
            &mut have.memory_swap_limit_in_bytes,
            update.memory_swap_limit_in_bytes,
        ),
        (&mut have.oom_score_adj, update.oom_score_adj),
    ] {
        if new != 0 {
            *old = new;
        }
    }
    for (old, new) in [
        (&mut have.cpuset_cpus, &update.cpuset_cpus),
        (&mut have.cpuset_mems, &update.cpuset_mems),
    ] {
        if !new.is_empty() {
            old.clone_from(new);
        }
    }
    have.unified.extend(update.unified.clone());
}

/// The memory limit in bytes of the pod's cgroup below `mount` (normally /sys/fs/cgroup), v2 or v1. `None` where there is no such
/// cgroup, no limit, or a name that leaves the tree.
pub fn cgroup_memory_limit(mount: &Path, parent: &str) -> Option<u64> {
    let parent = parent.trim_start_matches('/');
    if parent.is_empty() || parent.split('/').any(|part| part == "..") {
        return None;
    }
    let text = std::fs::read_to_string(mount.join(parent).join("memory.max"))
        .or_else(|_| {
            std::fs::read_to_string(
                mount
                    .join("memory")
                    .join(parent)
                    .join("memory.limit_in_bytes"),
            )
        })
        .ok()?;
    text.trim().parse().ok().filter(|limit| *limit < NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use proptest::prelude::*;

    fn pod(memory: i64, quota: i64, period: i64, overhead: i64) -> LinuxPodSandboxConfig {
        LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/podx".into(),
            resources: Some(LinuxContainerResources {
                memory_limit_in_bytes: memory,
                cpu_quota: quota,
                cpu_period: period,
                ..Default::default()
            }),
            overhead: Some(LinuxContainerResources {
                memory_limit_in_bytes: overhead,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn size(pod: &LinuxPodSandboxConfig, limit: Option<u64>) -> Result<(u8, u32), ConvertError> {
        vm_size(Some(pod), &Config::default().pod, limit).map(|size| (size.vcpus, size.memory_mib))
    }

    #[test]
    fn table() {
        let mib = MIB as i64;
        assert_eq!(size(&pod(0, 0, 0, 0), None), Ok((1, 320)));
        assert_eq!(
            size(&pod(512 * mib, 250_000, 100_000, 0), None),
            Ok((3, 576))
        );
        assert_eq!(
            size(&pod(512 * mib + 1, 50_000, 100_000, 128 * mib), None),
            Ok((1, 641))
        );
        assert_eq!(size(&pod(0, 200_000, 0, 0), None), Ok((2, 320)));
        assert_eq!(size(&pod(-5, -1, 0, -9), None), Ok((1, 320)));
        let default = vm_size(None, &Config::default().pod, None).unwrap();
        assert_eq!((default.vcpus, default.memory_mib), (1, 320));
    }

    #[test]
    fn refusal_shows_the_arithmetic() {
        let error = size(&pod(256 << 20, 0, 0, 0), Some(300 << 20)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("320 MiB (256 MiB for containers + 64 MiB overhead)"),
            "{text}"
        );
        assert!(text.contains("/kubepods/podx allows 300 MiB"), "{text}");
        assert!(size(&pod(256 << 20, 0, 0, 0), Some(320 << 20)).is_ok());
    }

    #[test]
    fn limits_of_both_hierarchies_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let v1 = dir.path().join("memory/kubepods/a");
        let v2 = dir.path().join("kubepods/b");
        std::fs::create_dir_all(&v1).unwrap();
        std::fs::create_dir_all(&v2).unwrap();
        std::fs::write(v1.join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        std::fs::write(v2.join("memory.max"), "max\n").unwrap();
        assert_eq!(cgroup_memory_limit(dir.path(), "/kubepods/a"), None);
        assert_eq!(cgroup_memory_limit(dir.path(), "/kubepods/b"), None);
        std::fs::write(v1.join("memory.limit_in_bytes"), "1048576\n").unwrap();
        std::fs::write(v2.join("memory.max"), "2097152\n").unwrap();
        assert_eq!(
            cgroup_memory_limit(dir.path(), "/kubepods/a"),
            Some(1 << 20)
        );
        assert_eq!(cgroup_memory_limit(dir.path(), "kubepods/b"), Some(2 << 20));
        assert_eq!(cgroup_memory_limit(dir.path(), "../kubepods/b"), None);
        assert_eq!(cgroup_memory_limit(dir.path(), ""), None);
    }

    fn room(memory: i64, quota: i64, now: i64) -> Result<(), String> {
        let size = VmSize {
            vcpus: 2,
            memory_mib: 320,
        };
        let of = |memory_limit_in_bytes, cpu_quota| LinuxContainerResources {
            memory_limit_in_bytes,
            cpu_quota,
            ..Default::default()
        };
        Room::of(size, None, &Config::default().pod)
            .admit(&of(memory << 20, quota), Some(&of(now << 20, 0)))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn updates_stay_within_the_vm() {
        assert_eq!(room(256, 200_000, 0), Ok(()));
        assert_eq!(room(-1, -1, 0), Ok(()));
        let refused = room(257, 0, 0).unwrap_err();
        assert!(refused.contains("257 MiB"), "{refused}");
        assert!(
            refused.contains("256 MiB for containers (320 MiB - 64 MiB overhead)"),
            "{refused}"
        );
        assert_eq!(room(512, 0, 512), Ok(()), "it has that already");
        let refused = room(0, 250_000, 0).unwrap_err();
        assert!(
            refused.contains("2.500 CPUs, and the pod's VM has 2"),
            "{refused}"
        );
    }

    #[test]
    fn cpuset_in_host_numbers_is_admitted() {
        let size = VmSize {
            vcpus: 2,
            memory_mib: 320,
        };
        let wish = LinuxContainerResources {
            cpuset_cpus: "3-17".into(),
            cpuset_mems: "0-1".into(),
            ..Default::default()
        };
        let room = Room::of(size, None, &Config::default().pod);
        assert_eq!(room.admit(&wish, None), Ok(()));
    }

    proptest! {
        #[test]
        fn no_update_panics(memory: i64, quota: i64, period: i64, cpus: String) {
            let wish = LinuxContainerResources {
                memory_limit_in_bytes: memory,
                cpu_quota: quota,
                cpu_period: period,
                cpuset_cpus: cpus,
                ..Default::default()
            };
            let size = VmSize { vcpus: 1, memory_mib: 1 };
            let _ = Room::of(size, Some(&wish), &Config::default().pod).admit(&wish, None);
        }

        #[test]
        fn no_numbers_panic(memory: i64, quota: i64, period: i64, overhead: i64, limit: Option<u64>) {
            if let Ok((vcpus, _)) = size(&pod(memory, quota, period, overhead), limit) {
                prop_assert!((1..=64).contains(&vcpus));
            }
        }
    }
}
