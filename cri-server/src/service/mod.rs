//! Implementation of the CRI: one file per RPC. `Server` holds the state that the RPCs share; `runtime` and `image`
//! implement the traits of the two services and delegate.
//!
//! An RPC converts the request, calls the runtime, and converts the answer. Its state is in `Server`, and it waits
//! for a VM only if the CRI requires it. Logging, latency metrics and panics are handled in `server::layer`.
//!
//! An RPC that changes state runs as a separate task (`Server::run_detached`), so that a disconnecting client does
//! not interrupt it.

mod capacity;
mod container_create;
mod container_events;
pub(crate) mod container_list;
mod container_log;
mod container_remove;
mod container_start;
mod container_stats;
mod container_status;
mod container_stop;
mod container_update;
mod error;
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
pub(crate) mod sandbox_list;
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
pub(crate) mod streams;
#[cfg(test)]
pub(crate) mod tests;
pub(crate) mod unimplemented;
mod version;

use crate::cni::Cni;
use crate::config::{Config, WithoutCni};
use crate::convert::{ConvertError, container, sandbox::PodMetadata, status};
use crate::layout::Layout;
use crate::metrics::Metrics;
use crate::nri::Nri;
use crate::streaming::{RequestedStreams, Streaming, Ticket};
use crate::subject;
use boxlite_proto::cri::v1::{ContainerConfig, RunPodSandboxRequest};
use boxlite_runtime::{
    BoxliteRuntime, ContainerSnapshot, ContainerState, ErrorKind, LiteBox, RuntimeError,
};
use boxlite_sys::sync::Mutex;
use boxlite_telemetry::WithTrace;
use boxlite_telemetry::span::set_current;
use error::ServiceError;
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

/// State shared by both services. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Server(Arc<Inner>);

/// Interval between attempts to release a leaked network: initial, and maximum after doubling. CNI plugins fail for
/// seconds (a lock, a loaded machine) or until an administrator intervenes.
const CNI_RETRY_INTERVAL: Duration = Duration::from_secs(2);
const MAX_CNI_RETRY_INTERVAL: Duration = Duration::from_secs(120);

/// Contents of [`Server`].
#[derive(Debug)]
pub(crate) struct Inner {
    pub runtime: BoxliteRuntime,
    pub config: Config,
    pub cni: Cni,
    pub layout: Layout,
    pub metrics: Arc<Metrics>,
    /// Selected VMM and the reason, for Status.
    pub vmm: String,
    streaming: Streaming,
    /// Pods whose RunPodSandbox is in progress; lists omit them.
    starting: Mutex<HashSet<String>>,
    runs: SingleFlight<RunPodSandboxRequest>,
    creates: SingleFlight<ContainerConfig>,
    /// By container id.
    starts: SingleFlight<String>,
    /// Set once at the start; unset means that NRI is disabled.
    nri: OnceLock<Nri>,
    pod_cidrs: Mutex<Vec<String>>,
    tasks: TaskTracker,
    /// Cancelled when the daemon stops serving: ends the streams that have no end.
    stopping: CancellationToken,
}

impl std::ops::Deref for Server {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl Server {
    /// Returns whether passt serves the network of a pod now: no plugin is configured, and the operator chose it.
    fn has_passt(&self) -> bool {
        self.config.network.without_cni == WithoutCni::Passt
            && self.cni.ready().is_err_and(|error| error.is_unconfigured())
    }

    /// `vmm` describes the selected VMM and the reason.
    pub(crate) fn new(
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
            runs: SingleFlight::new("pod sandbox"),
            creates: SingleFlight::new("container"),
            starts: SingleFlight::new("container"),
            nri: OnceLock::new(),
            pod_cidrs: Mutex::default(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        }))
    }

    /// Records the volumes of containers of an earlier run. Called at the start; not awaited, since a host path may not answer.
    pub(crate) fn restore_shared_volumes(&self) {
        let server = self.clone();
        tokio::task::spawn_blocking(move || {
            for snapshot in server.runtime.containers() {
                let config = container::ContainerMetadata::from_bytes(&snapshot.metadata).config();
                let volumes = &server.metrics.shared_volumes;
                volumes.restore(&snapshot.box_id, &config);
            }
        });
    }

    /// Removes networks and files of pods that no longer exist. Called at the start, before the first request.
    /// Networks whose plugins fail are retried until this server stops.
    pub(crate) async fn remove_orphans(&self) {
        let mut live: HashSet<String> =
            self.runtime.boxes().into_iter().map(|pod| pod.id).collect();
        live.extend(self.runtime.unmanaged().iter().cloned());
        let (networks, left) = self.cni.collect(&live).await;
        let files = pod_files::collect(&self.layout, &live);
        if networks + files > 0 {
            tracing::info!(
                networks,
                files,
                "removed leftovers of pods of an earlier run"
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

    /// Ends the endless streams; clients reconnect to the next daemon.
    pub(crate) fn close_streams(&self) {
        self.stopping.cancel();
    }

    /// Waits for the tasks of requests whose clients disconnected. Must be called after the last request.
    pub(crate) async fn wait_for_tasks(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Runs `work` to completion even if the caller's future is dropped.
    pub(crate) async fn run_detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        match self
            .tasks
            .spawn(work.in_current_span().in_current_trace())
            .await
        {
            Ok(done) => done,
            Err(_) => Err(ServiceError::Panicked.into()),
        }
    }

    /// Returns the pod of a request, by id or unique prefix. A pod whose RunPodSandbox is in progress is not found,
    /// because plugins may still reject it.
    fn pod(&self, id: &str) -> Result<LiteBox, Status> {
        require("pod_sandbox_id", id)?;
        let pod = self
            .runtime
            .get_box(id)
            .map_err(|error| status::status(&error))?;
        if self.starting.lock().contains(pod.id()) {
            let id = pod.id().to_owned();
            return Err(ServiceError::PodStarting { id }.into());
        }
        subject::record_pod(&pod);
        Ok(pod)
    }

    /// Returns the pod of a request, or `None` if it does not exist: for the idempotent RPCs.
    fn pod_if_any(&self, id: &str) -> Result<Option<LiteBox>, Status> {
        require("pod_sandbox_id", id)?;
        let pod = none_if_not_found(self.runtime.get_box(id))?;
        if let Some(pod) = &pod {
            subject::record_pod(pod);
        }
        Ok(pod)
    }

    /// Returns the container of a request, by id or unique prefix, and its pod.
    fn find_container(&self, id: &str) -> Result<(LiteBox, ContainerSnapshot), RuntimeError> {
        let (pod, container) = self.runtime.find_container(id)?;
        subject::record_pod(&pod);
        set_current("container.id", &container.id);
        Ok((pod, container))
    }

    /// Returns the one-time URL of `ticket`.
    fn stream_url(&self, ticket: Ticket) -> Result<String, Status> {
        let url = self.streaming.url(ticket);
        url.map_err(|full| ServiceError::Sessions(full).into())
    }

    /// Returns a running container and its pod; fails with FAILED_PRECONDITION if it does not run.
    fn running_container(&self, id: &str) -> Result<(LiteBox, ContainerSnapshot), Status> {
        require("container_id", id)?;
        let (pod, container) = self.find_container(id).map_err(status_of)?;
        if container.state != ContainerState::Running {
            return Err(ServiceError::ContainerState {
                id: container.id,
                state: container.state,
                required: ContainerState::Running,
            }
            .into());
        }
        Ok((pod, container))
    }

    /// Returns the metadata of a pod.
    fn pod_metadata(&self, pod: &LiteBox) -> PodMetadata {
        PodMetadata::from_bytes(&pod.snapshot().metadata)
    }
}

/// Returns an error if a required identifier of a request is empty.
fn require(field: &'static str, value: &str) -> Result<(), ConvertError> {
    if value.is_empty() {
        return Err(ConvertError::Missing(field));
    }
    Ok(())
}

/// Returns the requested streams if the combination is valid.
fn requested_streams(
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
) -> Result<RequestedStreams, ConvertError> {
    if tty && stderr {
        // A terminal has a single output.
        let reason = "tty and stderr cannot both be true";
        return Err(ConvertError::invalid("stderr", "true", reason));
    }
    if !stdin && !stdout && !stderr {
        let reason = "one of stdin, stdout, and stderr must be set";
        return Err(ConvertError::invalid("stdin", "false", reason));
    }
    Ok(RequestedStreams {
        stdin,
        stdout,
        stderr,
        tty,
    })
}

/// Maps NotFound to `None`, and every other error to a status.
fn none_if_not_found<T>(found: Result<T, RuntimeError>) -> Result<Option<T>, Status> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(status::status(&error)),
    }
}

/// Converts an error of the runtime, for `map_err`.
fn status_of(error: RuntimeError) -> Status {
    status::status(&error)
}

/// Returns 64 hex digits from the system's random generator.
fn new_id() -> String {
    let mut bytes = [0; 32];
    rand::rng().fill_bytes(&mut bytes);
    hex::encode(bytes)
}
