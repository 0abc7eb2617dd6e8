//! The Prometheus page: the daemon's registry, and one built for each scrape from the runtime's snapshots, so that removed pods
//! have no lines.

use crate::convert::sandbox::PodMetadata;
use boxlite_runtime::pool::PoolStatus;
use boxlite_runtime::{BoxSnapshot, BoxState, ContainerSnapshot, RuntimeMetricsSnapshot};
use prometheus::{Counter, CounterVec, Gauge, GaugeVec, Opts, Registry, TextEncoder};

/// Labels of the per-pod metrics.
const POD_LABELS: [&str; 4] = ["pod", "namespace", "uid", "id"];

/// Returns the page as text.
pub(crate) fn render(
    standing: &Registry,
    totals: &RuntimeMetricsSnapshot,
    pods: &[BoxSnapshot],
    containers: &[ContainerSnapshot],
    shared_volumes: usize,
    pool: Option<&PoolStatus>,
) -> prometheus::Result<String> {
    let scrape = Registry::new();
    runtime(&scrape, totals)?;
    let lines = PodLines::new(&scrape)?;
    for pod in pods {
        lines.add(pod);
    }
    let states = GaugeVec::new(
        Opts::new("boxlite_containers", "Containers by state"),
        &["state"],
    )?;
    for container in containers {
        states
            .with_label_values(&[&container.state.to_string()])
            .inc();
    }
    scrape.register(Box::new(states))?;
    let shared = Gauge::new(
        "boxlite_shared_volume_writers",
        "Host directories that more than one running pod mounts with write access",
    )?;
    shared.set(shared_volumes as f64);
    scrape.register(Box::new(shared))?;
    if let Some(status) = pool {
        super::pool::add(&scrape, status)?;
    }
    let mut families = standing.gather();
    families.extend(scrape.gather());
    TextEncoder::new().encode_to_string(&families)
}

fn runtime(registry: &Registry, totals: &RuntimeMetricsSnapshot) -> prometheus::Result<()> {
    for (name, help, value) in [
        (
            "boxlite_boxes_created_total",
            "Pods registered since the daemon's start",
            totals.boxes_created,
        ),
        (
            "boxlite_boxes_destroyed_total",
            "Pods removed since the daemon's start",
            totals.boxes_destroyed,
        ),
        (
            "boxlite_exec_calls_total",
            "Processes started by exec",
            totals.total_exec_calls,
        ),
        (
            "boxlite_bytes_transferred_total",
            "Bytes of payload through the Portals, in both directions",
            totals.total_bytes_transferred,
        ),
        (
            "boxlite_quarantined_records_total",
            "Damaged records, files and layers found since the daemon's start",
            totals.quarantined,
        ),
    ] {
        let counter = Counter::new(name, help)?;
        counter.inc_by(value as f64);
        registry.register(Box::new(counter))?;
    }
    let version = GaugeVec::new(
        Opts::new("boxlite_build_info", "Version of the daemon"),
        &["version"],
    )?;
    version
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1.0);
    registry.register(Box::new(version))?;
    let time = Gauge::new(
        "boxlite_scrape_timestamp_seconds",
        "Time of this scrape, in seconds since the epoch",
    )?;
    time.set(crate::convert::time::now_ns() as f64 / 1e9);
    registry.register(Box::new(time))
}

struct PodLines {
    cpu: CounterVec,
    memory: GaugeVec,
    execs: CounterVec,
    sent: CounterVec,
    received: CounterVec,
    ready: GaugeVec,
    stale: GaugeVec,
    stages: GaugeVec,
}

impl PodLines {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            let vec = CounterVec::new(Opts::new(name, help), &POD_LABELS)?;
            registry.register(Box::new(vec.clone()))?;
            Ok::<_, prometheus::Error>(vec)
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            let vec = GaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(vec.clone()))?;
            Ok::<_, prometheus::Error>(vec)
        };
        Ok(Self {
            cpu: counter(
                "boxlite_box_cpu_seconds_total",
                "CPU time of the guest, as last sampled",
            )?,
            memory: gauge(
                "boxlite_box_memory_usage_bytes",
                "Memory in use in the guest, as last sampled",
                &POD_LABELS,
            )?,
            execs: counter("boxlite_box_exec_total", "Processes started by exec")?,
            sent: counter(
                "boxlite_box_network_sent_bytes_total",
                "Bytes sent by the guest's NICs",
            )?,
            received: counter(
                "boxlite_box_network_received_bytes_total",
                "Bytes received by the guest's NICs",
            )?,
            ready: gauge("boxlite_box_ready", "1 if the guest answers", &POD_LABELS)?,
            stale: gauge(
                "boxlite_box_stale",
                "1 if the sampled values are old because the guest did not answer",
                &POD_LABELS,
            )?,
            stages: gauge(
                "boxlite_box_start_stage_seconds",
                "Duration of the stages of the pod's start",
                &["pod", "namespace", "uid", "id", "stage"],
            )?,
        })
    }

    fn add(&self, pod: &BoxSnapshot) {
        let record = PodMetadata::from_bytes(&pod.metadata);
        let metadata = record.metadata();
        let labels = [
            metadata.name.as_str(),
            metadata.namespace.as_str(),
            metadata.uid.as_str(),
            pod.id.as_str(),
        ];
        let metrics = &pod.metrics;
        self.cpu
            .with_label_values(&labels)
            .inc_by(metrics.cpu_time_ms as f64 / 1e3);
        self.memory
            .with_label_values(&labels)
            .set(metrics.memory_usage_bytes as f64);
        self.execs
            .with_label_values(&labels)
            .inc_by(metrics.exec_count as f64);
        self.sent
            .with_label_values(&labels)
            .inc_by(metrics.network_bytes_sent as f64);
        self.received
            .with_label_values(&labels)
            .inc_by(metrics.network_bytes_received as f64);
        let flag = |set: bool| if set { 1.0 } else { 0.0 };
        self.ready
            .with_label_values(&labels)
            .set(flag(pod.state == BoxState::Ready));
        self.stale
            .with_label_values(&labels)
            .set(flag(metrics.stale));
        let network = ("cni".to_owned(), record.network_ms);
        for (stage, ms) in std::iter::once(&network).chain(&pod.timers.stages) {
            let labels = [labels[0], labels[1], labels[2], labels[3], stage.as_str()];
            self.stages.with_label_values(&labels).set(*ms as f64 / 1e3);
        }
    }
}
