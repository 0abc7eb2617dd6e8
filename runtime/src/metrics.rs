//! Counters: [`RuntimeMetrics`] over all boxes, [`BoxMetrics`] of one, and the stage timers of a start.
//!
//! Counters are plain atomics; reading them does not wait for a VM. cri-server adds labels. Values from the guest are
//! written by the sampler of [`crate::litebox`], which also marks them as stale.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// A stage of the start pipeline; see [`crate::litebox::pipeline`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Agent and kernel are checked.
    Image,
    /// Bundle and private directories are created.
    Rootfs,
    /// A warm VM becomes the box's; replaces the stages before `Ready`.
    Claim,
    /// The shim answers.
    Spawn,
    /// The guest answers.
    Ready,
}

impl Stage {
    /// Returns the label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Rootfs => "rootfs",
            Self::Claim => "claim",
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

/// Durations of the stages of one start in ms, in order. The shim's stages follow `ready`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTimers {
    /// (name, ms).
    pub stages: Vec<(String, u64)>,
}

impl StageTimers {
    /// Appends a stage.
    pub fn record(&mut self, stage: impl Into<String>, took: Duration) {
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.stages.push((stage.into(), ms));
    }

    /// Returns the duration of a stage in ms, if it was reached.
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
    /// Bytes sent by the guest's NICs, as last sampled.
    pub network_bytes_sent: AtomicU64,
    /// Bytes received by the guest's NICs, as last sampled.
    pub network_bytes_received: AtomicU64,
    /// Payload through the Portal, both ways, in bytes.
    pub bytes_transferred: Arc<AtomicU64>,
    /// Time of the last sample in ns since the epoch; 0 before it.
    pub sampled_at_ns: AtomicI64,
    /// True if the last sampling failed.
    pub stale: AtomicBool,
}

/// Snapshot of [`BoxMetrics`].
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
    /// Returns the present values.
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

/// Counters of a runtime since it was opened. Boxes hold their own counters; the counters of removed boxes are added
/// up here.
#[derive(Debug, Default)]
pub struct RuntimeMetrics {
    /// Boxes registered.
    pub boxes_created: AtomicU64,
    /// Boxes removed.
    pub boxes_destroyed: AtomicU64,
    removed_exec_calls: AtomicU64,
    removed_bytes: AtomicU64,
}

/// Snapshot of [`RuntimeMetrics`] including all boxes.
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
    /// Damaged records and files that were found when the runtime was opened.
    pub quarantined: u64,
}

impl RuntimeMetrics {
    /// Adds the counters of a removed box.
    pub fn box_removed(&self, metrics: &BoxMetricsSnapshot) {
        self.boxes_destroyed.fetch_add(1, Ordering::Relaxed);
        self.removed_exec_calls
            .fetch_add(metrics.exec_count, Ordering::Relaxed);
        self.removed_bytes
            .fetch_add(metrics.bytes_transferred, Ordering::Relaxed);
    }

    /// Returns the totals including the `present` boxes.
    pub fn snapshot(
        &self,
        present: impl Iterator<Item = BoxMetricsSnapshot>,
    ) -> RuntimeMetricsSnapshot {
        let start = RuntimeMetricsSnapshot {
            boxes_created: self.boxes_created.load(Ordering::Relaxed),
            boxes_destroyed: self.boxes_destroyed.load(Ordering::Relaxed),
            total_exec_calls: self.removed_exec_calls.load(Ordering::Relaxed),
            total_bytes_transferred: self.removed_bytes.load(Ordering::Relaxed),
            quarantined: 0,
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
    fn snapshot_adds_present_and_removed_boxes() {
        let metrics = RuntimeMetrics::default();
        let of = |exec_count, bytes_transferred| BoxMetricsSnapshot {
            exec_count,
            bytes_transferred,
            ..Default::default()
        };
        metrics.boxes_created.fetch_add(3, Ordering::Relaxed);
        metrics.box_removed(&of(5, 100));
        let total = metrics.snapshot([of(1, 10), of(2, 20)].into_iter());
        assert_eq!(total.boxes_created, 3);
        assert_eq!(total.boxes_destroyed, 1);
        assert_eq!(total.total_exec_calls, 8);
        assert_eq!(total.total_bytes_transferred, 130);
    }
}
