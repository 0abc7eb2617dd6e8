//! Counters: [`RuntimeMetrics`] over all boxes, [`BoxMetrics`] of one, and the stage timers of a start.
//!
//! Plain atomics beside what they count; reading never waits for a VM. cri-server puts labels on them. What the guest
//! must be asked for is brought here by the sampler of [`crate::litebox`], which also marks it stale.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// A stage of the start pipeline; see [`crate::litebox::pipeline`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Agent and kernel are there.
    Image,
    /// Bundle and private directories are there.
    Rootfs,
    /// The shim answers.
    Spawn,
    /// The guest answers.
    Ready,
}

impl Stage {
    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Rootfs => "rootfs",
            Self::Spawn => "spawn",
            Self::Ready => "ready",
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stage {}", self.name())
    }
}

/// How long the stages of one start took, in ms, in their order. The shim may add its own below `ready`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimers {
    /// (name, ms).
    pub stages: Vec<(String, u64)>,
}

impl StageTimers {
    /// Notes a stage.
    pub fn record(&mut self, stage: impl Into<String>, took: Duration) {
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.stages.push((stage.into(), ms));
    }

    /// ms of one stage, if it was reached.
    pub fn get(&self, stage: &str) -> Option<u64> {
        self.stages
            .iter()
            .find(|(name, _)| name == stage)
            .map(|(_, ms)| *ms)
    }
}

/// Counters of one box.
#[derive(Debug, Default)]
pub struct BoxMetrics {
    /// CPU time of the guest in ms, as last sampled.
    pub cpu_time_ms: AtomicU64,
    /// Memory in use in the guest in bytes, as last sampled.
    pub memory_usage_bytes: AtomicU64,
    /// Processes started by exec.
    pub exec_count: AtomicU64,
    /// Sent by the guest's network cards, as last sampled.
    pub network_bytes_sent: AtomicU64,
    /// Received by them, as last sampled.
    pub network_bytes_received: AtomicU64,
    /// Payload through the Portal, both ways, in bytes.
    pub bytes_transferred: Arc<AtomicU64>,
    /// When the sampled values were taken, ns since the epoch; 0: never.
    pub sampled_at_ns: AtomicI64,
    /// Whether the last sampling did not succeed.
    pub stale: AtomicBool,
}

/// [`BoxMetrics`] at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BoxMetricsSnapshot {
    /// See [`BoxMetrics::cpu_time_ms`].
    pub cpu_time_ms: u64,
    /// See [`BoxMetrics::memory_usage_bytes`].
    pub memory_usage_bytes: u64,
    /// See [`BoxMetrics::exec_count`].
    pub exec_count: u64,
    /// See [`BoxMetrics::network_bytes_sent`].
    pub network_bytes_sent: u64,
    /// See [`BoxMetrics::network_bytes_received`].
    pub network_bytes_received: u64,
    /// See [`BoxMetrics::bytes_transferred`].
    pub bytes_transferred: u64,
    /// See [`BoxMetrics::sampled_at_ns`].
    pub sampled_at_ns: i64,
    /// See [`BoxMetrics::stale`].
    pub stale: bool,
}

impl BoxMetrics {
    /// The present values.
    pub fn snapshot(&self) -> BoxMetricsSnapshot {
        BoxMetricsSnapshot {
            cpu_time_ms: self.cpu_time_ms.load(Ordering::Relaxed),
            memory_usage_bytes: self.memory_usage_bytes.load(Ordering::Relaxed),
            exec_count: self.exec_count.load(Ordering::Relaxed),
            network_bytes_sent: self.network_bytes_sent.load(Ordering::Relaxed),
            network_bytes_received: self.network_bytes_received.load(Ordering::Relaxed),
            bytes_transferred: self.bytes_transferred.load(Ordering::Relaxed),
            sampled_at_ns: self.sampled_at_ns.load(Ordering::Relaxed),
            stale: self.stale.load(Ordering::Relaxed),
        }
    }
}

/// Counters of a runtime since it was opened. What belongs to boxes is kept by the boxes; here is only what boxes
/// that left had.
#[derive(Debug, Default)]
pub struct RuntimeMetrics {
    /// Boxes registered.
    pub boxes_created: AtomicU64,
    /// Boxes removed.
    pub boxes_destroyed: AtomicU64,
    departed_exec_calls: AtomicU64,
    departed_bytes: AtomicU64,
}

/// [`RuntimeMetrics`] with all boxes added up, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeMetricsSnapshot {
    /// Boxes registered since the runtime was opened.
    pub boxes_created: u64,
    /// Boxes removed since then.
    pub boxes_destroyed: u64,
    /// Processes started by exec, in boxes present and gone.
    pub total_exec_calls: u64,
    /// Payload through Portals, both ways, of boxes present and gone, in bytes.
    pub total_bytes_transferred: u64,
}

impl RuntimeMetrics {
    /// Takes over the counters of a box that leaves.
    pub fn departed(&self, metrics: &BoxMetricsSnapshot) {
        self.boxes_destroyed.fetch_add(1, Ordering::Relaxed);
        self.departed_exec_calls
            .fetch_add(metrics.exec_count, Ordering::Relaxed);
        self.departed_bytes
            .fetch_add(metrics.bytes_transferred, Ordering::Relaxed);
    }

    /// The totals, with the boxes that are `present`.
    pub fn snapshot(
        &self,
        present: impl Iterator<Item = BoxMetricsSnapshot>,
    ) -> RuntimeMetricsSnapshot {
        let start = RuntimeMetricsSnapshot {
            boxes_created: self.boxes_created.load(Ordering::Relaxed),
            boxes_destroyed: self.boxes_destroyed.load(Ordering::Relaxed),
            total_exec_calls: self.departed_exec_calls.load(Ordering::Relaxed),
            total_bytes_transferred: self.departed_bytes.load(Ordering::Relaxed),
        };
        present.fold(start, |mut sum, metrics| {
            sum.total_exec_calls += metrics.exec_count;
            sum.total_bytes_transferred += metrics.bytes_transferred;
            sum
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_present_plus_departed() {
        let metrics = RuntimeMetrics::default();
        let of = |exec_count, bytes_transferred| BoxMetricsSnapshot {
            exec_count,
            bytes_transferred,
            ..Default::default()
        };
        metrics.boxes_created.fetch_add(3, Ordering::Relaxed);
        metrics.departed(&of(5, 100));
        let total = metrics.snapshot([of(1, 10), of(2, 20)].into_iter());
        assert_eq!(total.boxes_created, 3);
        assert_eq!(total.boxes_destroyed, 1);
        assert_eq!(total.total_exec_calls, 8);
        assert_eq!(total.total_bytes_transferred, 130);
    }
}
