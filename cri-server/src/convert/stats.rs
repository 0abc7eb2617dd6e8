//! Conversion of a guest's cgroup counters to the CRI's stats. The runtime has bounded the values by the VM's size;
//! sums and products saturate.

use super::container::ContainerMetadata;
use super::status;
use boxlite_config::cgroup::UNLIMITED_BYTES;
use boxlite_proto::boxlite::v1::{
    CgroupStats, ContainerStatsResponse, GuestStatsResponse, Pressure, PressureLine,
};
use boxlite_proto::cri::v1::{
    ContainerAttributes, ContainerStats, CpuUsage, FilesystemIdentifier, FilesystemUsage, IoUsage,
    LinuxPodSandboxStats, MemoryUsage, NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes,
    PodSandboxStats, ProcessUsage, PsiData, PsiStats, SwapUsage, UInt64Value,
};
use boxlite_runtime::{BoxSnapshot, ContainerSnapshot};

fn wrap(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn cpu(stats: &CgroupStats, timestamp: i64) -> CpuUsage {
    CpuUsage {
        timestamp,
        usage_core_nano_seconds: wrap(stats.cpu_usage_usec.saturating_mul(1000)),
        // The kubelet computes the rate from two samples.
        usage_nano_cores: None,
        psi: psi(stats.cpu_pressure.as_ref()),
    }
}

/// Returns a line of memory.stat.
pub(crate) fn stat(stats: &CgroupStats, key: &str) -> u64 {
    stats.memory_stat.get(key).copied().unwrap_or(0)
}

/// Returns the working set as the kubelet and cAdvisor define it: usage without inactive page cache.
pub(crate) fn working_set(stats: &CgroupStats) -> u64 {
    stats
        .memory_current
        .saturating_sub(stat(stats, "inactive_file"))
}

/// Returns the memory that the kernel cannot reclaim: usage without page cache.
pub(crate) fn unreclaimable(stats: &CgroupStats) -> u64 {
    working_set(stats).saturating_sub(stat(stats, "active_file"))
}

/// Converts pressure, with totals in ns; `None` if the guest's kernel has no PSI.
fn psi(pressure: Option<&Pressure>) -> Option<PsiStats> {
    let data = |line: Option<PressureLine>| {
        line.map(|line| PsiData {
            total: line.total_usec.saturating_mul(1000),
            avg10: line.avg10,
            avg60: line.avg60,
            avg300: line.avg300,
        })
    };
    pressure.map(|pressure| PsiStats {
        full: data(pressure.full),
        some: data(pressure.some),
    })
}

fn io(stats: &CgroupStats, timestamp: i64) -> Option<IoUsage> {
    psi(stats.io_pressure.as_ref()).map(|psi| IoUsage {
        timestamp,
        psi: Some(psi),
    })
}

fn memory(stats: &CgroupStats, timestamp: i64) -> MemoryUsage {
    let working_set = working_set(stats);
    let limited = stats.memory_max > 0 && stats.memory_max < UNLIMITED_BYTES;
    MemoryUsage {
        timestamp,
        working_set_bytes: wrap(working_set),
        available_bytes: if limited {
            wrap(stats.memory_max.saturating_sub(working_set))
        } else {
            None
        },
        usage_bytes: wrap(stats.memory_current),
        rss_bytes: wrap(stat(stats, "anon")),
        page_faults: wrap(stat(stats, "pgfault")),
        major_page_faults: wrap(stat(stats, "pgmajfault")),
        psi: psi(stats.memory_pressure.as_ref()),
    }
}

/// Returns the identity of a container.
pub(crate) fn attributes(snapshot: &ContainerSnapshot) -> ContainerAttributes {
    let config = ContainerMetadata::from_bytes(&snapshot.metadata).config();
    ContainerAttributes {
        id: snapshot.id.clone(),
        metadata: config.metadata,
        labels: config.labels,
        annotations: config.annotations,
    }
}

/// Returns the stats of a container. Without `answer` (it does not run, or its guest did not answer) they have only
/// its attributes. `scratch` is the host file system of the writable layer.
pub(crate) fn container(
    snapshot: &ContainerSnapshot,
    answer: Option<&ContainerStatsResponse>,
    scratch: &str,
    now: i64,
) -> ContainerStats {
    let Some(answer) = answer else {
        return ContainerStats {
            attributes: Some(attributes(snapshot)),
            ..Default::default()
        };
    };
    // Samples carry the host's time, because the guest's clock is untrusted.
    let cgroup = answer.cgroup.clone().unwrap_or_default();
    ContainerStats {
        attributes: Some(attributes(snapshot)),
        cpu: Some(cpu(&cgroup, now)),
        memory: Some(memory(&cgroup, now)),
        writable_layer: Some(FilesystemUsage {
            timestamp: now,
            fs_id: Some(FilesystemIdentifier {
                mountpoint: scratch.to_owned(),
            }),
            used_bytes: wrap(answer.upper_bytes),
            inodes_used: wrap(answer.upper_inodes),
        }),
        swap: Some(SwapUsage {
            timestamp: now,
            swap_available_bytes: wrap(0),
            swap_usage_bytes: wrap(cgroup.memory_swap_current),
        }),
        io: io(&cgroup, now),
    }
}

/// Returns the stats of a pod. Without `answer` they have only its attributes and its containers.
pub(crate) fn sandbox(
    snapshot: &BoxSnapshot,
    answer: Option<&GuestStatsResponse>,
    containers: Vec<ContainerStats>,
    now: i64,
) -> PodSandboxStats {
    let listed = status::sandbox(snapshot);
    let mut linux = LinuxPodSandboxStats {
        containers,
        ..Default::default()
    };
    if let Some(answer) = answer {
        let pod = answer.pod.clone().unwrap_or_default();
        linux.cpu = Some(cpu(&pod, now));
        linux.memory = Some(memory(&pod, now));
        linux.io = io(&pod, now);
        linux.process = Some(ProcessUsage {
            timestamp: now,
            process_count: wrap(u64::from(answer.process_count)),
        });
        let interfaces: Vec<NetworkInterfaceUsage> = answer
            .networks
            .iter()
            .filter(|network| network.interface != "lo")
            .map(|network| NetworkInterfaceUsage {
                name: network.interface.clone(),
                rx_bytes: wrap(network.rx_bytes),
                rx_errors: wrap(network.rx_errors),
                tx_bytes: wrap(network.tx_bytes),
                tx_errors: wrap(network.tx_errors),
            })
            .collect();
        let (default, others): (Vec<_>, Vec<_>) = interfaces
            .into_iter()
            .partition(|interface| interface.name == crate::cni::INTERFACE);
        linux.network = Some(NetworkUsage {
            timestamp: now,
            default_interface: default.into_iter().next(),
            interfaces: others,
        });
    }
    PodSandboxStats {
        attributes: Some(PodSandboxAttributes {
            id: listed.id,
            metadata: listed.metadata,
            labels: listed.labels,
            annotations: listed.annotations,
        }),
        linux: Some(linux),
        windows: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_set_is_usage_less_inactive_file() {
        let stats = CgroupStats {
            memory_current: 1000,
            memory_max: 4000,
            memory_stat: [("inactive_file".to_owned(), 300), ("anon".to_owned(), 500)].into(),
            ..Default::default()
        };
        let usage = memory(&stats, 7);
        assert_eq!(usage.working_set_bytes, wrap(700));
        assert_eq!(usage.available_bytes, wrap(3300));
        assert_eq!(usage.rss_bytes, wrap(500));
    }

    #[test]
    fn extreme_guest_values_saturate() {
        let stats = CgroupStats {
            cpu_usage_usec: u64::MAX,
            memory_current: 1,
            memory_max: u64::MAX,
            memory_stat: [("inactive_file".to_owned(), u64::MAX)].into(),
            ..Default::default()
        };
        assert_eq!(cpu(&stats, 0).usage_core_nano_seconds, wrap(u64::MAX));
        let usage = memory(&stats, 0);
        assert_eq!(usage.working_set_bytes, wrap(0));
        assert_eq!(usage.available_bytes, None);
    }
}
