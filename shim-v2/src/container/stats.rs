//! The guest's cgroup counters as containerd's message `io.containerd.cgroups.v2.Metrics`.
//!
//! A field-by-field copy; names on both sides are the kernel's.

use boxlite_proto::boxlite::v1::{CgroupStats, NetworkStats};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

/// Type URL of the message, as containerd's typeurl writes it: without host.
pub const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// The counters as an Any.
///
/// # Errors
/// When the message cannot be encoded.
pub fn any(
    stats: &CgroupStats,
    networks: &[NetworkStats],
) -> Result<Any, containerd_shim_protos::protobuf::Error> {
    Ok(Any {
        type_url: METRICS_TYPE.to_owned(),
        value: metrics(stats, networks).write_to_bytes()?,
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
    let of = |name: &str| stats.memory_stat.get(name).copied().unwrap_or(0);
    MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
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
