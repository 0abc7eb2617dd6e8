//! The CRI: one file per verb. `Server` is what a verb works with; `runtime` and `image` are the traits of the two services and only
//! hand on.
//!
//! A verb converts, makes one or two calls of the runtime, answers. It holds no state but what is in `Server`, reads no path, and
//! waits for a VM only where the CRI's meaning is to wait. Logging, latency and panics are `server::layer`'s.
//!
//! What changes something runs as a task of its own (`Server::run_detached`): a client that goes away tears nothing half-way.

mod capacity;
mod container_create;
mod container_events;
mod container_list;
mod container_log;
mod container_remove;
mod container_start;
mod container_stats;
mod container_status;
mod container_stop;
mod container_update;
mod exec_sync;
mod image;
mod image_fs;
mod image_list;
mod image_pull;
mod image_remove;
mod image_status;
mod nri_hooks;
mod pod_files;
mod runtime;
mod runtime_config;
mod runtime_status;
mod sandbox_list;
mod sandbox_metrics;
mod sandbox_remove;
mod sandbox_run;
mod sandbox_stats;
mod sandbox_status;
mod sandbox_stop;
mod sandbox_update;
mod single_flight;
mod stream_attach;
mod stream_exec;
mod stream_forward;
mod streams;
#[cfg(test)]
pub mod tests;
pub mod unimplemented;
mod version;

use crate::cni::{Cni, CniError};
use crate::config::Config;
use crate::convert::{sandbox::PodMetadata, status};
use crate::layout::Layout;
use crate::metrics::Metrics;
use crate::nri::Nri;
use crate::streaming::{Streaming, Ticket};
use boxlite_proto::cri::v1::{ContainerConfig, RunPodSandboxRequest};
use boxlite_runtime::{
    BoxliteRuntime, ContainerSnapshot, ContainerState, ErrorKind, LiteBox, RuntimeError,
};
use boxlite_sys::sync::Mutex;
use rand::RngCore;
use single_flight::SingleFlight;
use std::collections::HashSet;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::Instrument;

/// What both services work with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Server(Arc<Inner>);

/// Until a leaked network is tried again: first and, doubled each time, at most. Plugins fail for seconds (a lock, a
/// machine under load) or until somebody mends them.
const CNI_RETRY_INTERVAL: Duration = Duration::from_secs(2);
const MAX_CNI_RETRY_INTERVAL: Duration = Duration::from_secs(120);

/// See [`Server`].
#[derive(Debug)]
pub struct Inner {
    pub runtime: BoxliteRuntime,
    pub config: Config,
    pub cni: Cni,
    pub layout: Layout,
    pub metrics: Arc<Metrics>,
    /// What runs pods and why, for Status.
    pub vmm: String,
    streaming: Streaming,
    /// Pods whose RunPodSandbox is under way; no list shows them yet.
    starting: Mutex<HashSet<String>>,
    runs: SingleFlight<RunPodSandboxRequest>,
    creates: SingleFlight<ContainerConfig>,
    /// Set once at the start; without it nobody is told of anything.
    nri: OnceLock<Nri>,
    pod_cidrs: Mutex<Vec<String>>,
    tasks: TaskTracker,
    /// Cancelled when no new call comes any more: streams without an end of their own end.
    stopping: CancellationToken,
}

impl std::ops::Deref for Server {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Server {
    /// `vmm` says in words what runs pods and why.
    pub fn new(
        runtime: BoxliteRuntime,
        config: Config,
        metrics: Arc<Metrics>,
        vmm: String,
        streaming: Streaming,
    ) -> Self {
        let layout = Layout::new(&config.root, &config.state);
        Self(Arc::new(Inner {
            cni: Cni::new(&config.cni, &layout),
            runtime,
            config,
            layout,
            metrics,
            vmm,
            streaming,
            starting: Mutex::default(),
            runs: SingleFlight::default(),
            creates: SingleFlight::default(),
            nri: OnceLock::new(),
            pod_cidrs: Mutex::default(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        }))
    }

    /// Undoes networks and files of pods that are gone. For the start, before the first call.
    /// Networks whose plugins fail now are tried again, until this server leaves.
    pub async fn remove_orphans(&self) {
        let live: HashSet<String> = self.runtime.boxes().into_iter().map(|pod| pod.id).collect();
        let (networks, left) = self.cni.collect(&live).await;
        let files = pod_files::collect(&self.layout, &live);
        if networks + files > 0 {
            tracing::info!(
                networks,
                files,
                "removed what pods of an earlier run left behind"
            );
        }
        if !left.is_empty() {
            self.tasks.spawn(self.clone().retry_cni_release(left));
        }
    }

    async fn retry_cni_release(self, mut networks: HashSet<String>) {
        let mut pause = CNI_RETRY_INTERVAL;
        let stopping = self.stopping.clone();
        while !networks.is_empty() {
            let waited = stopping
                .run_until_cancelled(tokio::time::sleep(pause))
                .await;
            if waited.is_none() {
                return;
            }
            networks = self.cni.release_again(networks).await;
            pause = (pause * 2).min(MAX_CNI_RETRY_INTERVAL);
        }
    }

    /// Ends the streams that would go on for ever: clients follow the next daemon.
    pub fn close_streams(&self) {
        self.stopping.cancel();
    }

    /// Waits for the tasks of calls whose clients have gone. No new call may come any more.
    pub async fn wait_for_tasks(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Runs `work` to its end even when the caller's future is dropped.
    async fn run_detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        match self.tasks.spawn(work.in_current_span()).await {
            Ok(done) => done,
            Err(_) => Err(Status::internal(
                "the call's task panicked; the daemon's log has the place",
            )),
        }
    }

    /// The pod of a request, by id or unique prefix. One whose RunPodSandbox is under way is not there yet: its plugins may still refuse it.
    fn pod(&self, id: &str) -> Result<LiteBox, Status> {
        require("pod_sandbox_id", id)?;
        let pod = self
            .runtime
            .get_box(id)
            .map_err(|error| status::status(&error))?;
        if self.starting.lock().contains(pod.id()) {
            return Err(Status::not_found(format!(
                "pod {} is still being started",
                pod.id()
            )));
        }
        Ok(pod)
    }

    /// The pod of a request, or `None` where it is gone: for the verbs that succeed on what is gone.
    fn pod_if_any(&self, id: &str) -> Result<Option<LiteBox>, Status> {
        require("pod_sandbox_id", id)?;
        none_if_not_found(self.runtime.get_box(id))
    }

    /// The URL at which a client may use `ticket` once.
    fn stream_url(&self, ticket: Ticket) -> Result<String, Status> {
        self.streaming
            .url(ticket)
            .map_err(|full| Status::resource_exhausted(full.to_string()))
    }

    /// A container that runs and its pod; FAILED_PRECONDITION for one that does not.
    fn running_container(&self, id: &str) -> Result<(LiteBox, ContainerSnapshot), Status> {
        require("container_id", id)?;
        let (pod, container) = self.runtime.find_container(id).map_err(status_of)?;
        if container.state != ContainerState::Running {
            return Err(Status::failed_precondition(format!(
                "container {} is {}, not running",
                container.id, container.state
            )));
        }
        Ok((pod, container))
    }

    /// The pod's own record.
    fn pod_metadata(&self, pod: &LiteBox) -> PodMetadata {
        PodMetadata::from_bytes(&pod.snapshot().metadata)
    }
}

/// An error of a request's identifier that is not there.
fn require(field: &'static str, value: &str) -> Result<(), Status> {
    if value.is_empty() {
        return Err(Status::invalid_argument(format!("{field} is missing")));
    }
    Ok(())
}

/// NotFound as `None`, every other error as a status.
fn none_if_not_found<T>(found: Result<T, RuntimeError>) -> Result<Option<T>, Status> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(status::status(&error)),
    }
}

/// For `map_err`.
fn status_of(error: RuntimeError) -> Status {
    status::status(&error)
}

/// The status of a network's failure.
fn cni_status(error: &CniError) -> Status {
    let text = boxlite_runtime::report(error);
    match error {
        CniError::Conf(_) => Status::failed_precondition(text),
        CniError::Plugin {
            source: crate::cni::PluginError::Timeout(_),
            ..
        } => Status::deadline_exceeded(text),
        _ => Status::internal(text),
    }
}

/// 64 hex digits of the system's random generator.
fn new_id() -> String {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    hex::encode(bytes)
}

/// A lock whose holder panicked still guards plain data.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock()
}
