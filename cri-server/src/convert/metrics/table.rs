//! Names of the metrics, as in cAdvisor and required by Kubernetes 1.36, with their source in a VM.
//!
//! The kubelet matches label values to these keys by position, so descriptors and `super::Figures` must agree; a test
//! compares them.

use boxlite_proto::cri::v1::MetricType;

/// Labels of every metric, as in cAdvisor.
pub(crate) const BASE: [&str; 6] = ["id", "name", "image", "container", "namespace", "pod"];

/// A metric.
#[derive(Debug)]
pub(crate) struct Descriptor {
    pub name: &'static str,
    pub help: &'static str,
    /// Labels in addition to [`BASE`].
    pub extra: &'static [&'static str],
    pub kind: MetricType,
}

const fn counter(
    name: &'static str,
    help: &'static str,
    extra: &'static [&'static str],
) -> Descriptor {
    Descriptor {
        name,
        help,
        extra,
        kind: MetricType::Counter,
    }
}

const fn gauge(
    name: &'static str,
    help: &'static str,
    extra: &'static [&'static str],
) -> Descriptor {
    Descriptor {
        name,
        help,
        extra,
        kind: MetricType::Gauge,
    }
}

const DEVICE: &[&str] = &["device"];
const INTERFACE: &[&str] = &["interface"];
const PAGE_SIZE: &[&str] = &["pagesize"];

/// All metrics.
#[rustfmt::skip]
pub(crate) static TABLE: [Descriptor; 56] = [
    counter("container_blkio_device_usage_total", "Bytes read from and written to a block device of the VM", &["device", "major", "minor", "operation"]),
    counter("container_cpu_cfs_periods_total", "CPU enforcement periods that passed", &[]),
    counter("container_cpu_cfs_throttled_periods_total", "CPU enforcement periods in which the limit was reached", &[]),
    counter("container_cpu_cfs_throttled_seconds_total", "Seconds throttled by the CPU limit", &[]),
    counter("container_cpu_system_seconds_total", "CPU time in the guest's kernel, in seconds", &[]),
    counter("container_cpu_usage_seconds_total", "CPU time, in seconds", &[]),
    counter("container_cpu_user_seconds_total", "CPU time in user mode, in seconds", &[]),
    gauge("container_file_descriptors", "Open file descriptors of all processes", &[]),
    gauge("container_fs_inodes_free", "Free inodes of the file system with the writable layers", DEVICE),
    gauge("container_fs_inodes_total", "Inodes of the file system with the writable layers", DEVICE),
    gauge("container_fs_limit_bytes", "Size of the file system with the writable layers", DEVICE),
    counter("container_fs_reads_bytes_total", "Bytes read from a block device of the VM", DEVICE),
    counter("container_fs_reads_total", "Reads from a block device of the VM", DEVICE),
    gauge("container_fs_usage_bytes", "Bytes used by the writable layer", DEVICE),
    counter("container_fs_writes_bytes_total", "Bytes written to a block device of the VM", DEVICE),
    counter("container_fs_writes_total", "Writes to a block device of the VM", DEVICE),
    gauge("container_hugetlb_max_usage_bytes", "Maximum memory used from huge pages; not recorded by cgroup v2", PAGE_SIZE),
    gauge("container_hugetlb_usage_bytes", "Memory used from huge pages", PAGE_SIZE),
    gauge("container_last_seen", "Time at which the values were read, in seconds since the epoch", &[]),
    gauge("container_memory_cache", "Page cache", &[]),
    counter("container_memory_failcnt", "Number of times that the memory limit was reached", &[]),
    counter("container_memory_failures_total", "Page faults", &["failure_type", "scope"]),
    gauge("container_memory_kernel_usage", "Memory of the guest's kernel for this cgroup", &[]),
    gauge("container_memory_mapped_file", "Memory mapped from files", &[]),
    gauge("container_memory_max_usage_bytes", "Maximum memory used", &[]),
    gauge("container_memory_rss", "Anonymous memory", &[]),
    gauge("container_memory_swap", "Swap in use", &[]),
    gauge("container_memory_usage_bytes", "Memory in use, including inactive page cache", &[]),
    gauge("container_memory_working_set_bytes", "Memory in use without inactive page cache", &[]),
    counter("container_network_receive_bytes_total", "Bytes received", INTERFACE),
    counter("container_network_receive_errors_total", "Errors while receiving", INTERFACE),
    counter("container_network_receive_packets_dropped_total", "Packets dropped while receiving", INTERFACE),
    counter("container_network_receive_packets_total", "Packets received", INTERFACE),
    counter("container_network_transmit_bytes_total", "Bytes sent", INTERFACE),
    counter("container_network_transmit_errors_total", "Errors while sending", INTERFACE),
    counter("container_network_transmit_packets_dropped_total", "Packets dropped while sending", INTERFACE),
    counter("container_network_transmit_packets_total", "Packets sent", INTERFACE),
    counter("container_oom_events_total", "Processes killed by the OOM killer of the guest's kernel", &[]),
    counter("container_pressure_cpu_stalled_seconds_total", "Seconds in which all tasks waited for CPU", &[]),
    counter("container_pressure_cpu_waiting_seconds_total", "Seconds in which some task waited for CPU", &[]),
    counter("container_pressure_io_stalled_seconds_total", "Seconds in which all tasks waited for IO", &[]),
    counter("container_pressure_io_waiting_seconds_total", "Seconds in which some task waited for IO", &[]),
    counter("container_pressure_memory_stalled_seconds_total", "Seconds in which all tasks waited for memory", &[]),
    counter("container_pressure_memory_waiting_seconds_total", "Seconds in which some task waited for memory", &[]),
    gauge("container_processes", "Processes", &[]),
    gauge("container_sockets", "Open sockets of all processes", &[]),
    gauge("container_spec_cpu_period", "Period of the CPU limit, in microseconds", &[]),
    gauge("container_spec_cpu_quota", "CPU time allowed in a period, in microseconds", &[]),
    gauge("container_spec_cpu_shares", "CPU shares", &[]),
    gauge("container_spec_memory_limit_bytes", "Memory limit; 0 if unlimited", &[]),
    gauge("container_spec_memory_reservation_limit_bytes", "Memory that is not reclaimed; 0 if unset", &[]),
    gauge("container_spec_memory_swap_limit_bytes", "Swap limit; 0 if unlimited", &[]),
    gauge("container_start_time_seconds", "Start time, in seconds since the epoch", &[]),
    gauge("container_threads", "Threads", &[]),
    gauge("container_threads_max", "Maximum number of threads; 0 if unlimited", &[]),
    gauge("container_ulimits_soft", "Soft limits of the first process; an infinite limit has no value", &["ulimit"]),
];
