//! [`LiteBox`]: one pod's VM and the containers in it. Signatures first; bodies follow.

use crate::error::{Result, RuntimeError};
use crate::metrics::BoxMetricsSnapshot;
use crate::portal::{ExecOutput, GuestSession};
use crate::types::{BoxSnapshot, ContainerOptions, ContainerSnapshot};
use boxlite_proto::boxlite::v1::{ContainerStatsResponse, GuestStatsResponse};
use std::time::Duration;

/// A handle to one box. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LiteBox {
    present: std::sync::Arc<BoxSnapshot>,
}

fn not_yet<T>() -> Result<T> {
    Err(RuntimeError::Internal {
        what: "not yet built".into(),
    })
}

impl LiteBox {
    /// Id.
    pub fn id(&self) -> &str {
        ""
    }
    /// Runs the start pipeline, or joins the one that runs. Dropping the future leaves the pipeline running.
    ///
    /// # Errors
    /// `Start` with the stage, `Denied` on a stopped box.
    pub async fn start(&self) -> Result<()> {
        not_yet()
    }
    /// Ends the VM; idempotent.
    ///
    /// # Errors
    /// Whatever kept the shim from ending.
    pub async fn stop(&self) -> Result<()> {
        not_yet()
    }
    /// Stops, removes containers, bundle and record; idempotent.
    ///
    /// # Errors
    /// Whatever is left, by name.
    pub async fn remove(&self) -> Result<()> {
        not_yet()
    }
    /// State at this moment; never waits.
    pub fn snapshot(&self) -> BoxSnapshot {
        self.present.as_ref().clone()
    }
    /// All containers; never waits.
    pub fn containers(&self) -> Vec<ContainerSnapshot> {
        Vec::new()
    }
    /// One container, by full id; never waits.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn container(&self, _id: &str) -> Result<ContainerSnapshot> {
        not_yet()
    }
    /// Creates a container; starts the box first if need be.
    ///
    /// # Errors
    /// Many.
    pub async fn create_container(&self, _options: ContainerOptions) -> Result<ContainerSnapshot> {
        not_yet()
    }
    /// Lets it run.
    ///
    /// # Errors
    /// `ContainerState` unless it is Created.
    pub async fn start_container(&self, _id: &str) -> Result<()> {
        not_yet()
    }
    /// `signal` (Linux number), `grace`, SIGKILL. Ok where it ended already.
    ///
    /// # Errors
    /// `Deadline`.
    pub async fn stop_container(&self, _id: &str, _grace: Duration, _signal: i32) -> Result<()> {
        not_yet()
    }
    /// Kills and removes; ok where it is gone.
    ///
    /// # Errors
    /// Whatever is left.
    pub async fn remove_container(&self, _id: &str) -> Result<()> {
        not_yet()
    }
    /// New limits: OCI LinuxResources as JSON.
    ///
    /// # Errors
    /// As the guest has it.
    pub async fn update_container(&self, _id: &str, _resources_json: Vec<u8>) -> Result<()> {
        not_yet()
    }
    /// Runs a command in a running container.
    ///
    /// # Errors
    /// `DeadlineExceeded` after `timeout`, with the whole tree killed.
    pub async fn exec_sync(
        &self,
        _id: &str,
        _argv: Vec<String>,
        _timeout: Option<Duration>,
        _output_limit: usize,
    ) -> Result<ExecOutput> {
        not_yet()
    }
    /// Counters of one container, from the guest, within a deadline of its own.
    ///
    /// # Errors
    /// Of the Portal.
    pub async fn container_stats(&self, _id: &str) -> Result<ContainerStatsResponse> {
        not_yet()
    }
    /// Counters of the VM, from the guest, within a deadline of its own.
    ///
    /// # Errors
    /// Of the Portal.
    pub async fn stats(&self) -> Result<GuestStatsResponse> {
        not_yet()
    }
    /// Has the shim close and reopen the container's log.
    ///
    /// # Errors
    /// Of the shim.
    pub async fn reopen_log(&self, _id: &str) -> Result<()> {
        not_yet()
    }
    /// Counters as last sampled; never waits.
    pub fn metrics(&self) -> BoxMetricsSnapshot {
        BoxMetricsSnapshot::default()
    }
    /// The way into the guest.
    ///
    /// # Errors
    /// `BoxGone` without a running VM.
    pub fn portal(&self) -> Result<GuestSession> {
        not_yet()
    }
}
