//! Converts the guest's cgroup counters to containerd's message `io.containerd.cgroups.v2.Metrics`.
//!
//! A field-by-field copy; both sides use the kernel's names. Values are limited to those that a VM of its size can have, since
//! a hostile guest may report any.

use boxlite_proto::boxlite::v1::{CgroupStats, NetworkStats};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

/// Type URL of the message, without a host as in containerd's typeurl.
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// Upper limits of the values that a VM can reach.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Memory of the VM.
    pub memory_bytes: u64,
    /// CPU time of all vCPUs since the VM was created.
    pub cpu_usec: u64,
}

/// Encodes the counters, limited by `limits`, as an Any.
///
/// # Errors
/// The message cannot be encoded.
pub fn any(
    stats: &CgroupStats,
    networks: &[NetworkStats],
    limits: Limits,
) -> Result<Any, containerd_shim_protos::protobuf::Error> {
    Ok(Any {
        type_url: METRICS_TYPE.to_owned(),
        value: metrics(&limited(stats, limits), networks).write_to_bytes()?,
        ..Default::default()
    })
}

/// Returns a copy of `stats` whose memory and CPU usage are possible for the VM. The configured limits are not changed.
fn limited(stats: &CgroupStats, limits: Limits) -> CgroupStats {
    let mut stats = stats.clone();
    for value in [
        &mut stats.memory_current,
        &mut stats.memory_peak,
        &mut stats.memory_swap_current,
    ] {
        *value = limits.memory_bytes.min(*value);
    }
    for (name, value) in &mut stats.memory_stat {
        // pgfault, pgmajfault and similar fields count events.
        if !name.starts_with("pg") && !name.starts_with("workingset_") {
            *value = limits.memory_bytes.min(*value);
        }
    }
    for value in [
        &mut stats.cpu_usage_usec,
        &mut stats.cpu_user_usec,
        &mut stats.cpu_system_usec,
    ] {
        *value = limits.cpu_usec.min(*value);
    }
    stats
}

fn metrics(stats: &CgroupStats, networks: &[NetworkStats]) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_max,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_usec,
            user_usec: stats.cpu_user_usec,
            system_usec: stats.cpu_system_usec,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_usec,
            ..Default::default()
        }),
        memory: MessageField::some(memory(stats)),
        io: MessageField::some(io(stats)),
        memory_events: MessageField::some(MemoryEvents {
            oom: stats.memory_events_oom,
            oom_kill: stats.memory_events_oom_kill,
            ..Default::default()
        }),
        network: networks.iter().map(network).collect(),
        ..Default::default()
    }
}

fn memory(stats: &CgroupStats) -> MemoryStat {
    let value = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: value("anon"),
        file: value("file"),
        kernel_stack: value("kernel_stack"),
        slab: value("slab"),
        sock: value("sock"),
        shmem: value("shmem"),
        file_mapped: value("file_mapped"),
        file_dirty: value("file_dirty"),
        file_writeback: value("file_writeback"),
        anon_thp: value("anon_thp"),
        inactive_anon: value("inactive_anon"),
        active_anon: value("active_anon"),
        inactive_file: value("inactive_file"),
        active_file: value("active_file"),
        unevictable: value("unevictable"),
        slab_reclaimable: value("slab_reclaimable"),
        slab_unreclaimable: value("slab_unreclaimable"),
        pgfault: value("pgfault"),
        pgmajfault: value("pgmajfault"),
        usage: stats.memory_current,
        usage_limit: stats.memory_max,
        swap_usage: stats.memory_swap_current,
        max_usage: stats.memory_peak,
        ..Default::default()
    }
}

fn io(stats: &CgroupStats) -> IOStat {
    let usage = stats.io.iter().map(|device| IOEntry {
        major: u64::from(device.major),
        minor: u64::from(device.minor),
        rbytes: device.rbytes,
        wbytes: device.wbytes,
        rios: device.rios,
        wios: device.wios,
        ..Default::default()
    });
    IOStat {
        usage: usage.collect(),
        ..Default::default()
    }
}

fn network(stats: &NetworkStats) -> NetworkStat {
    NetworkStat {
        name: stats.interface.clone(),
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limited_clamps_usage_to_the_vm_and_keeps_limits() {
        let mut stats = CgroupStats {
            memory_current: u64::MAX,
            memory_peak: 5,
            memory_max: u64::MAX,
            cpu_usage_usec: u64::MAX,
            cpu_user_usec: 7,
            ..Default::default()
        };
        stats.memory_stat.insert("anon".to_owned(), u64::MAX);
        stats.memory_stat.insert("pgfault".to_owned(), 1 << 40);
        let limits = Limits {
            memory_bytes: 1 << 30,
            cpu_usec: 1000,
        };
        let clamped = limited(&stats, limits);
        assert_eq!((clamped.memory_current, clamped.memory_peak), (1 << 30, 5));
        assert_eq!(clamped.memory_max, u64::MAX);
        assert_eq!((clamped.cpu_usage_usec, clamped.cpu_user_usec), (1000, 7));
        assert_eq!(clamped.memory_stat["anon"], 1 << 30);
        assert_eq!(clamped.memory_stat["pgfault"], 1 << 40);
    }
}
