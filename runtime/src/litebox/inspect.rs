//! What a [`LiteBox`] asks its guest directly, through the Portal: exec_sync, stats, and the sampling behind its
//! metrics.
//!
//! Changes no state of the box. Every question has a deadline of its own, so one stuck VM delays nobody else.

use super::{LiteBox, now_ns, teardown};
use crate::error::{Result, RuntimeError};
use crate::types::ContainerState;
use boxlite_portal::interfaces::execution::EXEC_OUTPUT_LIMIT;
use boxlite_portal::{ExecOutput, PortalError};
use boxlite_proto::boxlite::v1::{ContainerStatsResponse, ExecRequest, GuestStatsResponse};
use oci_spec::runtime::Spec;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::oneshot;

/// For one VM's stats: within the kubelet's and Prometheus' patience for all of them.
pub const STATS_LIMIT: Duration = Duration::from_secs(2);

impl LiteBox {
    /// Runs a command in a running container and collects its output, at most `output_limit` bytes (and never more
    /// than 16 MiB) of each stream.
    ///
    /// With `timeout` over, or the future dropped, the process and everything it started are killed.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState` unless it runs, `Portal`: kind DeadlineExceeded when `timeout` is over.
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
                reason: "a command needs at least its program".into(),
            });
        }
        let what = argv.join(" ");
        let process = serde_json::json!({ "args": argv });
        let request = self.exec_request(id, &process, false, false)?;
        let execution = self.portal()?.execution();
        let limit = output_limit.min(EXEC_OUTPUT_LIMIT);
        let (mut done, answer) = oneshot::channel();
        self.inner.env.tasks.spawn(async move {
            let (caller_left, left) = oneshot::channel();
            let running = execution.exec_sync(request, timeout, limit, async {
                let _ = left.await;
            });
            tokio::pin!(running);
            let result = tokio::select! {
                result = &mut running => result,
                () = done.closed() => {
                    let _ = caller_left.send(());
                    running.await
                }
            };
            let _ = done.send(result);
        });
        match answer.await {
            Ok(Ok(output)) => Ok(output),
            Ok(Err(PortalError::ExecDeadline { limit, .. })) => Err(PortalError::ExecDeadline {
                what: format!("command {what:?}"),
                limit,
            }
            .into()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(RuntimeError::ShuttingDown),
        }
    }

    /// The request for a new process in a running container, with an id nobody has; counts it. `process` is an OCI
    /// Process, of which the container's own gives what is left out.
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
                reason: "commands run in running containers only",
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

    /// The OCI spec that a container was made with; mount sources are host paths.
    ///
    /// # Errors
    /// `NotFound`, `Io`, `Internal` where it cannot be read back.
    pub async fn container_spec(&self, id: &str) -> Result<Spec> {
        self.exact(id)?;
        let path = self.inner.env.layout.container_config(self.id(), id);
        teardown::blocking(move || {
            let text = std::fs::read(&path).map_err(|source| RuntimeError::Io {
                what: "cannot read",
                path: path.clone(),
                source,
            })?;
            serde_json::from_slice(&text).map_err(|error| RuntimeError::Internal {
                what: format!("spec {}: {error}", path.display()),
            })
        })
        .await
    }

    /// A running container's first process, by its number in the guest.
    ///
    /// # Errors
    /// `NotFound`, `BoxGone`, `Portal`.
    pub async fn container_pid(&self, id: &str) -> Result<u32> {
        self.exact(id)?;
        let listed = self.portal()?.container().list(Some(id)).await?;
        let found = listed.into_iter().find(|info| info.container_id == id);
        found
            .map(|info| info.pid)
            .ok_or_else(|| RuntimeError::NotFound {
                what: "container",
                id: id.to_owned(),
            })
    }

    /// Counters of one container, from the guest, within [`STATS_LIMIT`]; with `processes` those of what runs in it too.
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
        Ok(container.stats(id, processes, STATS_LIMIT).await?)
    }

    /// Counters of the VM, from the guest, within [`STATS_LIMIT`]; the box's metrics get them too.
    ///
    /// # Errors
    /// `BoxGone`, `Portal`.
    pub async fn stats(&self) -> Result<GuestStatsResponse> {
        let metrics = &self.inner.metrics;
        let asked = match self.portal() {
            Ok(session) => session
                .guest()
                .stats(STATS_LIMIT)
                .await
                .map_err(RuntimeError::from),
            Err(error) => Err(error),
        };
        metrics.stale.store(asked.is_err(), Ordering::Relaxed);
        let stats = asked?;
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
        metrics
            .cpu_time_ms
            .store(stats.cpu_usage_ns / 1_000_000, Ordering::Relaxed);
        metrics.memory_usage_bytes.store(used, Ordering::Relaxed);
        metrics.network_bytes_sent.store(sent, Ordering::Relaxed);
        metrics
            .network_bytes_received
            .store(received, Ordering::Relaxed);
        metrics.sampled_at_ns.store(now_ns(), Ordering::Relaxed);
        Ok(stats)
    }
}
