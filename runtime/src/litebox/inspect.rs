//! Direct calls of a [`LiteBox`] to its guest through the Portal: exec_sync, stats, and the sampling of its metrics.
//!
//! Changes no state of the box. Every call has a timeout, so a stuck VM does not delay other boxes.

use super::{LiteBox, now_ns, teardown};
use crate::error::{Result, RuntimeError};
use crate::types::ContainerState;
use boxlite_portal::interfaces::execution::MAX_EXEC_OUTPUT_BYTES;
use boxlite_portal::stats_limits::StatsLimits;
use boxlite_portal::{ExecOutput, PortalError};
use boxlite_proto::boxlite::v1::{
    CgroupStats, ContainerStatsResponse, ExecRequest, GuestStatsResponse,
};
use oci_spec::runtime::Spec;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;

/// Timeout of one VM's stats; the kubelet and Prometheus wait longer than that for all VMs together.
pub(crate) const STATS_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for the driver to learn that the VM has ended, after a connection to its guest broke.
const VM_END_TIMEOUT: Duration = Duration::from_secs(1);

impl LiteBox {
    /// Runs a command in a running container and collects up to `output_limit` bytes (at most 16 MiB) of each output
    /// stream.
    ///
    /// If `timeout` expires or the future is dropped, the process and its descendants are killed.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState` unless it is running, `Portal` with kind DeadlineExceeded if `timeout` expires.
    pub async fn exec_sync(
        &self,
        id: &str,
        argv: Vec<String>,
        timeout: Option<Duration>,
        output_limit: usize,
    ) -> Result<ExecOutput> {
        if argv.is_empty() {
            return Err(RuntimeError::InvalidArgument {
                field: "cmd",
                value: String::new(),
                reason: "the command is empty".into(),
            });
        }
        let what = argv.join(" ");
        let process = serde_json::json!({ "args": argv });
        let request = self.exec_request(id, &process, false, false)?;
        let execution = self.portal()?.execution();
        let limit = output_limit.min(MAX_EXEC_OUTPUT_BYTES);
        let (mut done, answer) = oneshot::channel();
        self.inner.env.tasks.spawn(async move {
            let (cancel, cancelled) = oneshot::channel();
            let running = execution.exec_sync(request, timeout, limit, async {
                let _ = cancelled.await;
            });
            tokio::pin!(running);
            let result = tokio::select! {
                result = &mut running => result,
                () = done.closed() => {
                    let _ = cancel.send(());
                    running.await
                }
            };
            let _ = done.send(result);
        });
        match answer.await {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(PortalError::ExecDeadline { limit, .. })) => Err(PortalError::ExecDeadline {
                what: format!("command {what:?} in container {id:?}"),
                limit,
            }
            .into()),
            Ok(Err(error)) => {
                let action = format!("run a command in container {id:?}");
                Err(self.guest_error(action, error).await)
            }
            Err(_) => Err(RuntimeError::ShuttingDown),
        }
    }

    /// Returns the error of a call into the guest: `BoxGone` if the VM has ended, which a broken connection may reveal
    /// before the driver knows.
    pub async fn guest_error(&self, action: String, error: PortalError) -> RuntimeError {
        if error.is_transport() {
            let mut view = self.inner.view.clone();
            let ended = view.wait_for(|view| view.running.is_none());
            let known = tokio::time::timeout(VM_END_TIMEOUT, ended).await.is_ok();
            if let (true, Err(ended)) = (known, self.running()) {
                return ended;
            }
        }
        RuntimeError::guest(action)(error)
    }

    /// Builds the request for a new process in a running container, with a random exec id, and counts it. `process` is an
    /// OCI Process; missing fields are taken from the container's process.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState`, `Internal`.
    pub fn exec_request(
        &self,
        id: &str,
        process: &serde_json::Value,
        terminal: bool,
        stdin: bool,
    ) -> Result<ExecRequest> {
        let state = self.exact(id)?.state;
        if state != ContainerState::Running {
            return Err(RuntimeError::ContainerState {
                id: id.to_owned(),
                state,
                reason: "exec needs a running container",
            });
        }
        self.inner
            .metrics
            .exec_count
            .fetch_add(1, Ordering::Relaxed);
        Ok(ExecRequest {
            container_id: id.to_owned(),
            exec_id: hex::encode(rand::random::<[u8; 16]>()),
            process_json: process.to_string().into_bytes().into(),
            terminal,
            stdin,
        })
    }

    /// Returns the OCI spec that a container was created with; mount sources are host paths.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Internal` if it cannot be parsed.
    pub async fn container_spec(&self, id: &str) -> Result<Spec> {
        self.exact(id)?;
        let path = self.inner.env.layout.container_config(self.id(), id);
        teardown::blocking(move || {
            let text = std::fs::read(&path).map_err(|source| RuntimeError::Io {
                operation: "read",
                path: path.clone(),
                source,
            })?;
            serde_json::from_slice(&text).map_err(|error| RuntimeError::Internal {
                detail: format!("failed to parse {}: {error}", path.display()),
            })
        })
        .await
    }

    /// Returns the pid of a running container's init process in the guest.
    ///
    /// # Errors
    /// `NotFound`, `BoxGone`, `Shim`.
    pub async fn container_pid(&self, id: &str) -> Result<u32> {
        self.exact(id)?;
        self.running()?.shim.task_pid(id).await
    }

    /// Returns the counters of one container from the guest, within those of a VM of its size, with those of its processes if
    /// `processes` is set.
    ///
    /// # Errors
    /// `NotFound`, `BoxGone`, `Portal`.
    pub async fn container_stats(
        &self,
        id: &str,
        processes: bool,
    ) -> Result<ContainerStatsResponse> {
        self.exact(id)?;
        let container = self.portal()?.container();
        let stats = container.stats(id, processes, STATS_TIMEOUT).await;
        let mut stats = stats.map_err(RuntimeError::guest(format!(
            "get the statistics of container {id:?}"
        )))?;
        self.stats_limits().apply_to_container(&mut stats);
        self.keep_cpu_times(id, stats.cgroup.as_mut());
        Ok(stats)
    }

    /// Returns the bounds of the counters that the guest may report.
    fn stats_limits(&self) -> StatsLimits {
        let options = &self.inner.options;
        StatsLimits::of(
            options.memory_mib,
            options.scratch_bytes,
            options.vcpus,
            self.inner.created_at_ns,
        )
    }

    /// Replaces CPU times that are lower than those reported before.
    fn keep_cpu_times(&self, id: &str, stats: Option<&mut CgroupStats>) {
        let containers = &self.view().containers;
        let known = |id: &str| id == self.id() || containers.contains_key(id);
        self.inner.cpu_times.retain(known);
        if let Some(stats) = stats {
            self.inner.cpu_times.apply(id, stats);
        }
    }

    /// Returns the counters of the VM from the guest, within those of a VM of its size, and copies them into the box's metrics.
    ///
    /// # Errors
    /// `BoxGone`, `Portal`.
    pub async fn stats(&self) -> Result<GuestStatsResponse> {
        let metrics = &self.inner.metrics;
        let sampled = match self.portal() {
            Ok(session) => session
                .guest()
                .stats(STATS_TIMEOUT)
                .await
                .map_err(RuntimeError::from),
            Err(error) => Err(error),
        };
        metrics.stale.store(sampled.is_err(), Ordering::Relaxed);
        let mut stats = sampled?;
        self.stats_limits().apply_to_guest(&mut stats);
        self.keep_cpu_times(self.id(), stats.pod.as_mut());
        let used = stats
            .memory_total_bytes
            .saturating_sub(stats.memory_available_bytes);
        let (mut sent, mut received) = (0u64, 0u64);
        for network in stats
            .networks
            .iter()
            .filter(|network| network.interface != "lo")
        {
            sent = sent.saturating_add(network.tx_bytes);
            received = received.saturating_add(network.rx_bytes);
        }
        // A counter: a value below an earlier one is replaced by that.
        let cpu_ms = stats.cpu_usage_ns / 1_000_000;
        let before_ms = metrics.cpu_time_ms.fetch_max(cpu_ms, Ordering::Relaxed);
        stats.cpu_usage_ns = stats.cpu_usage_ns.max(before_ms.saturating_mul(1_000_000));
        metrics.memory_usage_bytes.store(used, Ordering::Relaxed);
        metrics.network_bytes_sent.store(sent, Ordering::Relaxed);
        metrics
            .network_bytes_received
            .store(received, Ordering::Relaxed);
        metrics.sampled_at_ns.store(now_ns(), Ordering::Relaxed);
        Ok(stats)
    }
}
