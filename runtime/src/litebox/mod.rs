//! [`LiteBox`]: a handle to one box, that is one VM per pod and the containers in it.
//!
//! A handle holds no state. It sends requests to the box's [`driver`], the task that owns the state (see the diagram in
//! `box_state`), and reads the [`BoxView`] that the driver publishes. `BoxliteRuntime::create_box` registers
//! a box without starting it; the first use runs the start [`pipeline`], and concurrent callers share that run.
//!
//! ```text
//!  callers ── Message ──▶ driver ── spawns ──▶ pipeline | teardown   (one at a time)
//!     ▲                     │  ▲                      │
//!     └── watch BoxView ◀───┘  └── results, exits ────┘
//! ```

mod containers;
pub(crate) mod driver;
mod images;
mod inspect;
pub(crate) mod pipeline;
mod sessions;
pub(crate) mod teardown;
#[cfg(test)]
mod tests;

use crate::box_state::{Denied, Phase, Request};
use crate::database::Database;
use crate::error::{Result, RuntimeError};
use crate::events::EventHub;
use crate::filesystem_layout::FilesystemLayout;
use crate::id_prefix::unique;
use crate::images::ImageManager;
use crate::init_rootfs::InitRootfs;
use crate::metrics::{BoxMetrics, BoxMetricsSnapshot, StageTimers};
use crate::panics::panicked;
use crate::shim_controller::{ShimController, ShimProgram};
use crate::types::{BoxOptions, BoxSnapshot, ContainerSnapshot};
use boxlite_portal::GuestSession;
use boxlite_portal::stats_limits::HighestCpuTimes;
use boxlite_proto::vmm::{Acceleration, PodName, VmmKind};
use boxlite_sys::ask::ask;
pub(crate) use boxlite_sys::clock::unix_ns as now_ns;
use boxlite_sys::sync::Mutex;
use boxlite_telemetry::{TraceContext, WithTrace};
use driver::Message;
pub use driver::UpdateMetadata;
pub use sessions::{ProcessControls, ProcessSession};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

/// State shared by all boxes of a runtime.
#[derive(Debug)]
pub(crate) struct BoxEnv {
    pub layout: FilesystemLayout,
    pub database: Database,
    pub init_rootfs: InitRootfs,
    pub program: ShimProgram,
    pub images: ImageManager,
    pub vmm: VmmKind,
    pub acceleration: Acceleration,
    /// Timeout of StartSandbox.
    pub start_limit: Duration,
    /// Tracks every task of every box; awaited on shutdown.
    pub tasks: TaskTracker,
    /// Cancelled on shutdown: drivers return and leave their boxes running.
    pub closing: CancellationToken,
    /// Receives the events of all drivers.
    pub events: EventHub,
    /// Warm VMs; unset if none are kept.
    pub warm: OnceLock<Arc<dyn WarmVms>>,
    /// Notified of each removed box before Remove returns.
    pub removed: Arc<dyn RemovalListener>,
}

/// Source of VMs that booted before their box was known. The pool implements it.
pub(crate) trait WarmVms: Send + Sync + std::fmt::Debug {
    /// Returns the shim of the VM that was claimed for this box, once.
    fn take(&self, id: &str) -> Option<ShimController>;
    /// Records whether the box runs in the VM that was taken.
    fn claimed(&self, succeeded: bool);
}

/// Observer of box removals. The runtime implements it to drop the box from its maps and to add up its metrics.
pub(crate) trait RemovalListener: Send + Sync + std::fmt::Debug {
    /// Called once per box by its driver.
    fn removed(&self, id: &str, metrics: &BoxMetricsSnapshot);
}

/// The state that a driver publishes.
#[derive(Debug, Clone)]
pub(crate) struct BoxView {
    /// Incremented by each publication.
    pub generation: u64,
    pub phase: Phase,
    pub reason: String,
    pub timers: StageTimers,
    /// Connections to the shim and the guest while the VM is believed to run.
    pub running: Option<Running>,
    pub vmm: VmmKind,
    /// The caller's opaque data.
    pub metadata: Arc<Vec<u8>>,
    pub containers: BTreeMap<String, ContainerSnapshot>,
}

/// Connections to a running VM.
#[derive(Debug, Clone)]
pub(crate) struct Running {
    pub shim: ShimController,
    pub session: GuestSession,
}

/// A handle to one box. Cheap to clone; all clones refer to the same box.
#[derive(Clone)]
pub struct LiteBox {
    inner: Arc<Inner>,
}

struct Inner {
    options: BoxOptions,
    created_at_ns: i64,
    env: Arc<BoxEnv>,
    messages: mpsc::Sender<Message>,
    view: watch::Receiver<Arc<BoxView>>,
    metrics: Arc<BoxMetrics>,
    /// CPU times that the guest reported, by container; those of the pod by the box's id.
    cpu_times: HighestCpuTimes,
    /// One lock per container that is being created, started or removed; these operations exclude each other.
    operations: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl std::fmt::Debug for LiteBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiteBox")
            .field("id", &self.inner.options.id)
            .finish_non_exhaustive()
    }
}

impl LiteBox {
    /// Returns the id.
    pub fn id(&self) -> &str {
        &self.inner.options.id
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.inner.options.name
    }

    /// Returns the names of the pod, if they are known.
    pub fn pod(&self) -> Option<&PodName> {
        self.inner.options.pod.as_ref()
    }

    /// Starts the box, or joins a start in progress; returns at once if the box is ready. Dropping the future does not
    /// cancel the start; a later call joins it.
    ///
    /// # Errors
    /// `Start` with the failed stage and its cause, after which the call may be retried; `Denied` for a stopped box.
    pub async fn start(&self) -> Result<()> {
        if self.view().phase == Phase::Ready {
            return Ok(());
        }
        self.request(Request::Start).await
    }

    /// Stops the VM and its shim; idempotent. Afterwards all containers are Exited. Dropping the future does not cancel
    /// the stop.
    ///
    /// # Errors
    /// The reason why the shim could not be stopped; the call may be retried.
    pub async fn stop(&self) -> Result<()> {
        match self.request(Request::Stop).await {
            Err(RuntimeError::NotFound { .. }) => Ok(()),
            result => result,
        }
    }

    /// Stops the box and removes its containers, bundle and database row; idempotent. Log files are kept.
    ///
    /// # Errors
    /// The reason why something could not be removed; the call may be retried.
    pub async fn remove(&self) -> Result<()> {
        match self.request(Request::Remove).await {
            Err(RuntimeError::NotFound { .. }) => Ok(()),
            result => result,
        }
    }

    /// Updates the limits that apply to all containers together, given as OCI LinuxResources in JSON. `update_metadata`
    /// then computes the caller's new data, which is persisted before this returns. Dropping the future does not cancel
    /// the update.
    ///
    /// # Errors
    /// `BoxGone` without a running VM, `Portal`, `Database`.
    pub async fn update_limits(
        &self,
        resources_json: Vec<u8>,
        update_metadata: UpdateMetadata,
    ) -> Result<()> {
        let this = self.clone();
        self.run_to_completion(async move {
            // Cannot collide with a container's lock: no container has the box's id.
            let operation = this.operation(this.id());
            let _guard = operation.lock().await;
            let guest = this.portal()?.guest();
            if let Err(error) = guest.update_pod(resources_json).await {
                let action = format!("update the limits of pod sandbox {:?}", this.id());
                return Err(this.guest_error(action, error).await);
            }
            this.send(|reply| Message::UpdateMetadata {
                update_metadata,
                reply,
            })
            .await?
        })
        .await
    }

    /// Returns the present state without waiting.
    pub fn snapshot(&self) -> BoxSnapshot {
        snapshot_of(
            &self.inner.options,
            self.inner.created_at_ns,
            &self.view(),
            &self.inner.metrics,
        )
    }

    /// Returns all containers ordered by id, without waiting.
    pub fn containers(&self) -> Vec<ContainerSnapshot> {
        self.view().containers.values().cloned().collect()
    }

    /// Returns the container with this id or unique id prefix, without waiting.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn container(&self, id: &str) -> Result<ContainerSnapshot> {
        unique("container", id, &self.view().containers).cloned()
    }

    /// Waits until `ready` accepts the published state or the box is removed. Has no timeout; cancel-safe.
    pub async fn changed_until(&self, mut ready: impl FnMut(&BoxSnapshot) -> bool) {
        let mut view = self.inner.view.clone();
        loop {
            view.borrow_and_update();
            if ready(&self.snapshot()) || view.changed().await.is_err() {
                return;
            }
        }
    }

    /// Returns the counters as last sampled, without waiting.
    pub fn metrics(&self) -> BoxMetricsSnapshot {
        self.inner.metrics.snapshot()
    }

    /// Returns the session with the guest.
    ///
    /// # Errors
    /// `BoxGone` without a running VM.
    pub fn portal(&self) -> Result<GuestSession> {
        self.running().map(|running| running.session)
    }

    fn view(&self) -> Arc<BoxView> {
        self.inner.view.borrow().clone()
    }

    fn running(&self) -> Result<Running> {
        let view = self.view();
        view.running.clone().ok_or_else(|| RuntimeError::BoxGone {
            id: self.id().to_owned(),
            reason: match view.phase {
                Phase::Created | Phase::Starting => "it has not been started".into(),
                _ if view.reason.is_empty() => "it was stopped".into(),
                _ => view.reason.clone(),
            },
        })
    }

    async fn request(&self, request: Request) -> Result<()> {
        let answer = self
            .send(|reply| Message::Request {
                request,
                reply,
                trace: TraceContext::current(),
            })
            .await?;
        answer.map_err(RuntimeError::Shared)
    }

    /// Sends a message and waits for its reply. The driver replies to every message unless it returns first.
    async fn send<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T> {
        let answer = ask(&self.inner.messages, message).await;
        answer.ok_or_else(|| self.driver_gone())
    }

    fn driver_gone(&self) -> RuntimeError {
        if self.inner.env.closing.is_cancelled() {
            return RuntimeError::ShuttingDown;
        }
        if !self.inner.messages.is_closed() {
            // The driver lives and dropped the reply.
            return panicked();
        }
        match self.view().phase {
            Phase::Removed => RuntimeError::NotFound {
                subject: "pod sandbox",
                id: self.id().to_owned(),
            },
            _ => RuntimeError::Denied {
                id: self.id().to_owned(),
                denied: Denied::Removing,
            },
        }
    }

    /// Runs `operation` to completion even if the caller goes away, so that no partially created container remains.
    async fn run_to_completion<T: Send + 'static>(
        &self,
        operation: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (done, answer) = oneshot::channel();
        let task = async move {
            let _ = done.send(operation.await);
        };
        self.inner
            .env
            .tasks
            .spawn(task.in_current_span().in_current_trace());
        answer.await.unwrap_or_else(|_| {
            Err(match self.inner.env.closing.is_cancelled() {
                true => RuntimeError::ShuttingDown,
                false => panicked(),
            })
        })
    }

    /// Returns the lock that create, start and remove of one container share.
    fn operation(&self, container_id: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut operations = self.inner.operations.lock();
        // Drops unused locks.
        operations.retain(|_, lock| Arc::strong_count(lock) > 1);
        operations
            .entry(container_id.to_owned())
            .or_default()
            .clone()
    }
}

/// Builds the public snapshot from the view that the driver published.
fn snapshot_of(
    options: &BoxOptions,
    created_at_ns: i64,
    view: &BoxView,
    metrics: &BoxMetrics,
) -> BoxSnapshot {
    let process = view
        .running
        .as_ref()
        .and_then(|running| running.shim.state().process.as_ref());
    let options = BoxOptions {
        metadata: view.metadata.to_vec(),
        ..options.clone()
    };
    BoxSnapshot {
        id: options.id.clone(),
        name: options.name.clone(),
        state: view.phase.public(),
        reason: view.reason.clone(),
        created_at_ns,
        metadata: options.metadata.clone(),
        timers: view.timers.clone(),
        vmm: view.vmm.clone(),
        shim_pid: process.map(|process| process.pid),
        metrics: metrics.snapshot(),
        options,
    }
}
