//! Converts the guest's cgroup counters to containerd's message `io.containerd.cgroups.v2.Metrics`.
//!
//! A field-by-field copy; both sides use the kernel's names. Values are limited to those that a VM of its size can have, since
//! a hostile guest may report any.

use boxlite_portal::stats_limits::StatsLimits;
use boxlite_proto::boxlite::v1::{CgroupStats, NetworkStats};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

/// Type URL of the message, without a host as in containerd's typeurl.
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// Encodes the counters, limited by `limits`, as an Any.
///
/// # Errors
/// The message cannot be encoded.
pub fn any(
    stats: &CgroupStats,
    networks: &[NetworkStats],
    limits: StatsLimits,
) -> Result<Any, containerd_shim_protos::protobuf::Error> {
    let mut stats = stats.clone();
    limits.apply(&mut stats);
    Ok(Any {
        type_url: METRICS_TYPE.to_owned(),
        value: metrics(&stats, networks).write_to_bytes()?,
        ..Default::default()
    })
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
