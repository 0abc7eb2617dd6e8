//! Conversion of a guest's counters to the CRI's metrics, under cAdvisor's names ([`table`]).
//!
//! The CRI's values are integers, so times are in whole seconds, as in other runtimes. The guest is untrusted: values
//! are passed through, and lists are bounded. Features that a kernel lacks have no value.

pub(crate) mod table;
#[cfg(test)]
mod tests;

use super::container::ContainerMetadata;
use super::sandbox::PodMetadata;
use super::stats::{stat, working_set};
use boxlite_config::cgroup::UNLIMITED_BYTES;
use boxlite_proto::boxlite::v1::{
    CgroupStats, ContainerStatsResponse, FilesystemStats, GuestStatsResponse, Pressure,
};
use boxlite_proto::cri::v1::{
    ContainerMetrics, LinuxContainerResources, Metric, MetricDescriptor, PodSandboxMetrics,
    UInt64Value,
};
use boxlite_runtime::{BoxSnapshot, ContainerSnapshot};
use table::{BASE, TABLE};

/// Maximum number of devices and interfaces per guest; a VM has fewer than 16 of either.
const MAX_ENTRIES: usize = 64;
/// Default period of the CPU limit in the kernel, in µs.
const DEFAULT_PERIOD_US: i64 = 100_000;
/// Default CPU shares of the kernel.
const DEFAULT_CPU_SHARES: i64 = 1024;
/// The ulimit that cAdvisor reports.
const OPEN_FILES: &str = "max_open_files";

/// Returns the response of ListMetricDescriptors.
pub(crate) fn descriptors() -> Vec<MetricDescriptor> {
    let keys = |extra: &[&str]| {
        BASE.iter()
            .chain(extra)
            .map(|&key| key.to_owned())
            .collect()
    };
    TABLE
        .iter()
        .map(|row| MetricDescriptor {
            name: row.name.to_owned(),
            help: row.help.to_owned(),
            label_keys: keys(row.extra),
        })
        .collect()
}

/// Returns the metrics of a pod: those of the whole pod (with an empty label `container`, as in cAdvisor), and those
/// of its containers.
pub(crate) fn pod(
    snapshot: &BoxSnapshot,
    answer: &GuestStatsResponse,
    containers: Vec<ContainerMetrics>,
    now: i64,
) -> PodSandboxMetrics {
    let record = PodMetadata::from_bytes(&snapshot.metadata);
    let metadata = record.metadata();
    let mut figures = Figures {
        labels: vec![
            cgroup_path(&record, ""),
            snapshot.id.clone(),
            String::new(),
            String::new(),
            metadata.namespace,
            metadata.name,
        ],
        now,
        metrics: Vec::new(),
    };
    let cgroup = answer.pod.clone().unwrap_or_default();
    figures.cgroup(&cgroup);
    figures.add("container_processes", &[], u64::from(answer.process_count));
    figures.network(answer);
    figures.add("container_last_seen", &[], seconds_of_ns(now));
    figures.add(
        "container_start_time_seconds",
        &[],
        seconds_of_ns(snapshot.created_at_ns),
    );
    PodSandboxMetrics {
        pod_sandbox_id: snapshot.id.clone(),
        metrics: figures.metrics,
        container_metrics: containers,
    }
}

/// Returns the metrics of a container. `scratch` is the file system of the writable layers.
pub(crate) fn container(
    pod: &BoxSnapshot,
    snapshot: &ContainerSnapshot,
    answer: &ContainerStatsResponse,
    scratch: Option<&FilesystemStats>,
    now: i64,
) -> ContainerMetrics {
    let sandbox = PodMetadata::from_bytes(&pod.metadata);
    let record = ContainerMetadata::from_bytes(&snapshot.metadata);
    let metadata = sandbox.metadata();
    let config = record.config();
    let mut figures = Figures {
        labels: vec![
            cgroup_path(&sandbox, &snapshot.id),
            snapshot.id.clone(),
            config.image.unwrap_or_default().image,
            config.metadata.unwrap_or_default().name,
            metadata.namespace,
            metadata.name,
        ],
        now,
        metrics: Vec::new(),
    };
    let cgroup = answer.cgroup.clone().unwrap_or_default();
    figures.cgroup(&cgroup);
    figures.limits(&cgroup, &record.resources().unwrap_or_default());
    figures.processes(answer);
    if let Some(scratch) = scratch {
        figures.filesystem(scratch, answer.upper_bytes);
    }
    figures.add("container_last_seen", &[], seconds_of_ns(now));
    figures.add(
        "container_start_time_seconds",
        &[],
        seconds_of_ns(snapshot.started_at_ns),
    );
    ContainerMetrics {
        container_id: snapshot.id.clone(),
        metrics: figures.metrics,
    }
}

/// Returns the label `id`. In cAdvisor it is the cgroup on the host; a container's cgroup is in the VM, below the
/// pod's.
fn cgroup_path(sandbox: &PodMetadata, container: &str) -> String {
    let parent = sandbox.cgroup_parent();
    let parent = parent.trim_matches('/');
    match (parent.is_empty(), container.is_empty()) {
        (true, _) => format!("/{container}"),
        (false, true) => format!("/{parent}"),
        (false, false) => format!("/{parent}/{container}"),
    }
}

fn seconds_of_ns(ns: i64) -> u64 {
    u64::try_from(ns / 1_000_000_000).unwrap_or(0)
}

/// Returns the limit, or 0 for unlimited, as in cAdvisor.
fn limit(value: u64) -> u64 {
    if value < UNLIMITED_BYTES { value } else { 0 }
}

/// Metrics of one subject.
struct Figures {
    labels: Vec<String>,
    now: i64,
    metrics: Vec<Metric>,
}

impl Figures {
    /// An unknown name is a bug in this file; a test covers all names.
    fn add(&mut self, name: &'static str, extra: &[&str], value: u64) {
        let Some(row) = TABLE.iter().find(|row| row.name == name) else {
            return;
        };
        debug_assert_eq!(row.extra.len(), extra.len(), "{name}");
        let extra = extra.iter().map(|&label| label.to_owned());
        self.metrics.push(Metric {
            name: name.to_owned(),
            timestamp: self.now,
            metric_type: row.kind as i32,
            label_values: self.labels.iter().cloned().chain(extra).collect(),
            value: Some(UInt64Value { value }),
        });
    }

    fn plain(&mut self, values: &[(&'static str, u64)]) {
        for (name, value) in values {
            self.add(name, &[], *value);
        }
    }

    /// Adds the values that every cgroup has.
    fn cgroup(&mut self, stats: &CgroupStats) {
        let seconds = |usec: u64| usec / 1_000_000;
        self.plain(&[
            (
                "container_cpu_usage_seconds_total",
                seconds(stats.cpu_usage_usec),
            ),
            (
                "container_cpu_user_seconds_total",
                seconds(stats.cpu_user_usec),
            ),
            (
                "container_cpu_system_seconds_total",
                seconds(stats.cpu_system_usec),
            ),
            ("container_cpu_cfs_periods_total", stats.cpu_nr_periods),
            (
                "container_cpu_cfs_throttled_periods_total",
                stats.cpu_nr_throttled,
            ),
            (
                "container_cpu_cfs_throttled_seconds_total",
                seconds(stats.cpu_throttled_usec),
            ),
            ("container_memory_cache", stat(stats, "file")),
            ("container_memory_failcnt", stats.memory_events_max),
            ("container_memory_kernel_usage", stat(stats, "kernel")),
            ("container_memory_mapped_file", stat(stats, "file_mapped")),
            ("container_memory_max_usage_bytes", stats.memory_peak),
            ("container_memory_rss", stat(stats, "anon")),
            ("container_memory_swap", stats.memory_swap_current),
            ("container_memory_usage_bytes", stats.memory_current),
            ("container_memory_working_set_bytes", working_set(stats)),
            ("container_oom_events_total", stats.memory_events_oom_kill),
            ("container_threads", stats.pids_current),
            ("container_threads_max", limit(stats.pids_max)),
        ]);
        // cgroup v2 counts a cgroup including its descendants, so both scopes are equal.
        for scope in ["container", "hierarchy"] {
            for kind in ["pgfault", "pgmajfault"] {
                let value = stat(stats, kind);
                self.add("container_memory_failures_total", &[kind, scope], value);
            }
        }
        for huge in stats.hugetlb.iter().take(MAX_ENTRIES) {
            self.add(
                "container_hugetlb_usage_bytes",
                &[&huge.page_size],
                huge.current,
            );
        }
        self.pressures(stats);
        self.devices(stats);
    }

    fn pressures(&mut self, stats: &CgroupStats) {
        for (stalled, waiting, pressure) in [
            (
                "container_pressure_cpu_stalled_seconds_total",
                "container_pressure_cpu_waiting_seconds_total",
                &stats.cpu_pressure,
            ),
            (
                "container_pressure_memory_stalled_seconds_total",
                "container_pressure_memory_waiting_seconds_total",
                &stats.memory_pressure,
            ),
            (
                "container_pressure_io_stalled_seconds_total",
                "container_pressure_io_waiting_seconds_total",
                &stats.io_pressure,
            ),
        ] {
            let Some(Pressure { some, full }) = pressure else {
                continue;
            };
            for (name, line) in [(stalled, full), (waiting, some)] {
                if let Some(line) = line {
                    self.add(name, &[], line.total_usec / 1_000_000);
                }
            }
        }
    }

    fn devices(&mut self, stats: &CgroupStats) {
        for io in stats.io.iter().take(MAX_ENTRIES) {
            let (major, minor) = (io.major.to_string(), io.minor.to_string());
            let device = io.device.as_str();
            for (name, value) in [
                ("container_fs_reads_bytes_total", io.rbytes),
                ("container_fs_reads_total", io.rios),
                ("container_fs_writes_bytes_total", io.wbytes),
                ("container_fs_writes_total", io.wios),
            ] {
                self.add(name, &[device], value);
            }
            for (operation, value) in [("Read", io.rbytes), ("Write", io.wbytes)] {
                self.add(
                    "container_blkio_device_usage_total",
                    &[device, &major, &minor, operation],
                    value,
                );
            }
        }
    }

    fn limits(&mut self, stats: &CgroupStats, spec: &LinuxContainerResources) {
        let set = |value: i64, default: i64| {
            u64::try_from(if value > 0 { value } else { default }).unwrap_or(0)
        };
        self.plain(&[
            (
                "container_spec_cpu_period",
                set(spec.cpu_period, DEFAULT_PERIOD_US),
            ),
            (
                "container_spec_cpu_shares",
                set(spec.cpu_shares, DEFAULT_CPU_SHARES),
            ),
            ("container_spec_memory_limit_bytes", limit(stats.memory_max)),
            (
                "container_spec_memory_reservation_limit_bytes",
                limit(stats.memory_low),
            ),
            (
                "container_spec_memory_swap_limit_bytes",
                limit(stats.memory_swap_max),
            ),
        ]);
        if spec.cpu_quota > 0 {
            self.add("container_spec_cpu_quota", &[], set(spec.cpu_quota, 0));
        }
    }

    fn processes(&mut self, answer: &ContainerStatsResponse) {
        let Some(inside) = &answer.processes else {
            return;
        };
        self.plain(&[
            ("container_processes", inside.processes),
            ("container_file_descriptors", inside.file_descriptors),
            ("container_sockets", inside.sockets),
        ]);
        if inside.max_open_files > 0 {
            self.add(
                "container_ulimits_soft",
                &[OPEN_FILES],
                inside.max_open_files,
            );
        }
    }

    fn filesystem(&mut self, scratch: &FilesystemStats, used: u64) {
        for (name, value) in [
            ("container_fs_inodes_free", scratch.inodes_free),
            ("container_fs_inodes_total", scratch.inodes),
            ("container_fs_limit_bytes", scratch.capacity_bytes),
            ("container_fs_usage_bytes", used),
        ] {
            self.add(name, &[&scratch.device], value);
        }
    }

    fn network(&mut self, answer: &GuestStatsResponse) {
        for network in answer.networks.iter().take(MAX_ENTRIES) {
            for (name, value) in [
                ("container_network_receive_bytes_total", network.rx_bytes),
                ("container_network_receive_errors_total", network.rx_errors),
                (
                    "container_network_receive_packets_dropped_total",
                    network.rx_dropped,
                ),
                (
                    "container_network_receive_packets_total",
                    network.rx_packets,
                ),
                ("container_network_transmit_bytes_total", network.tx_bytes),
                ("container_network_transmit_errors_total", network.tx_errors),
                (
                    "container_network_transmit_packets_dropped_total",
                    network.tx_dropped,
                ),
                (
                    "container_network_transmit_packets_total",
                    network.tx_packets,
                ),
            ] {
                self.add(name, &[&network.interface], value);
            }
        }
    }
}
