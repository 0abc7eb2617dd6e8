//! Prometheus metrics: RPC latencies, durations of start stages, totals of the runtime, and counters of every pod.
//!
//! A scrape reads memory only: the runtime samples guests in the background and marks stale values. `http` serves the page.

pub(crate) mod http;
mod page;
mod pool;
mod shared_volumes;
#[cfg(test)]
mod tests;

use crate::convert::sandbox::PodMetadata;
use boxlite_runtime::{BoxSnapshot, BoxState, BoxliteRuntime};
use prometheus::{HistogramOpts, HistogramVec, Registry};
use shared_volumes::SharedVolumes;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;

/// Histogram buckets of calls in seconds: a list takes less than 1 ms, a pod's start seconds under TCG.
const RPC_BUCKETS: [f64; 12] = [
    0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0,
];
/// Histogram buckets of start stages in seconds.
const STAGE_BUCKETS: [f64; 12] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0,
];

/// Latencies of calls.
#[derive(Debug)]
pub(crate) struct RpcMetrics {
    seconds: HistogramVec,
}

impl RpcMetrics {
    /// Records one call.
    pub(crate) fn observe(&self, method: &str, code: Code, took: Duration) {
        let code = format!("{code:?}");
        self.seconds
            .with_label_values(&[method, &code])
            .observe(took.as_secs_f64());
    }
}

/// The daemon's registry and its metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    rpc: Arc<RpcMetrics>,
    stages: HistogramVec,
    /// Directories that several pods write to.
    pub shared_volumes: SharedVolumes,
}

impl Metrics {
    /// Creates the metrics, all zero.
    ///
    /// # Errors
    /// If two metrics have the same name, which is a bug in this file.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let seconds = HistogramVec::new(
            HistogramOpts::new(
                "boxlite_cri_request_duration_seconds",
                "Latency of CRI calls",
            )
            .buckets(RPC_BUCKETS.into()),
            &["method", "code"],
        )?;
        let stages = HistogramVec::new(
            HistogramOpts::new(
                "boxlite_start_stage_duration_seconds",
                "Duration of the stages of pod starts",
            )
            .buckets(STAGE_BUCKETS.into()),
            &["stage"],
        )?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(stages.clone()))?;
        Ok(Self {
            registry,
            rpc: Arc::new(RpcMetrics { seconds }),
            stages,
            shared_volumes: SharedVolumes::default(),
        })
    }

    /// Returns the latencies, for the layer around the services.
    pub(crate) fn rpc(&self) -> Arc<RpcMetrics> {
        self.rpc.clone()
    }

    /// Records the start stages of a pod.
    pub(crate) fn started(&self, pod: &BoxSnapshot) {
        let network = PodMetadata::from_bytes(&pod.metadata).network_ms;
        let stages = pod
            .timers
            .stages
            .iter()
            .map(|(stage, ms)| (stage.as_str(), *ms));
        for (stage, ms) in std::iter::once(("cni", network)).chain(stages) {
            self.stages
                .with_label_values(&[stage])
                .observe(ms as f64 / 1e3);
        }
    }

    /// Returns the page without waiting for a VM.
    ///
    /// # Errors
    /// If the encoder fails.
    pub(crate) fn page(&self, runtime: &BoxliteRuntime) -> prometheus::Result<String> {
        let pods = runtime.boxes();
        let ready = pods.iter().filter(|pod| pod.state == BoxState::Ready);
        let ready: HashSet<&str> = ready.map(|pod| pod.id.as_str()).collect();
        page::render(
            &self.registry,
            &runtime.metrics(),
            &pods,
            &runtime.containers(),
            self.shared_volumes.shared(|id| ready.contains(id)),
            runtime.pool_status().as_ref(),
        )
    }
}
