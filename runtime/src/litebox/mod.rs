//! [`LiteBox`]: a handle to one box — one VM per pod, and the containers in it.
//!
//! A handle decides nothing: requests go to the box's [`driver`], the one task that writes its state (machine drawn in
//! `management::box_state`); answers and reads come from the [`BoxView`] it publishes. `create` (by
//! `BoxliteRuntime::create_box`) returns at once and starts nothing; the first use runs the start [`pipeline`],
//! shared by all who come meanwhile.
//!
//! ```text
//!  callers ── Message ──▶ driver ── spawns ──▶ pipeline | teardown   (one at a time)
//!     ▲                     │  ▲                      │
//!     └── watch BoxView ◀───┘  └──── ends, exits ─────┘
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

use crate::database::Database;
use crate::error::{Result, RuntimeError};
use crate::events::EventHub;
use crate::filesystem_layout::FilesystemLayout;
use crate::images::ImageManager;
use crate::init_rootfs::InitRootfs;
use crate::management::box_manager::unique;
use crate::management::box_state::{Denied, Phase, Request};
use crate::metrics::{BoxMetrics, BoxMetricsSnapshot, StageTimers};
use crate::shim_controller::{ShimController, ShimProgram};
use crate::types::{BoxOptions, BoxSnapshot, ContainerSnapshot};
use boxlite_portal::GuestSession;
use boxlite_proto::vmm::{Acceleration, VmmKind};
use boxlite_sys::sync::Mutex;
pub use driver::Describe;
use driver::Message;
pub use sessions::{ProcessControls, ProcessSession};
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What all boxes of a runtime share.
#[derive(Debug)]
pub(crate) struct BoxEnv {
    pub layout: FilesystemLayout,
    pub database: Database,
    pub init_rootfs: InitRootfs,
    pub program: ShimProgram,
    pub images: ImageManager,
    pub vmm: VmmKind,
    pub acceleration: Acceleration,
    /// Longest StartSandbox.
    pub start_limit: Duration,
    /// Owns every task of every box; awaited by the runtime's shutdown.
    pub tasks: TaskTracker,
    /// Cancelled when the runtime goes down: drivers end and leave their boxes running.
    pub closing: CancellationToken,
    /// Where drivers tell what happens.
    pub events: EventHub,
    /// Told the id of a box that is removed, before its removers are answered.
    pub removed: Arc<dyn RemovedBox>,
}

/// Who wants to know that a box is gone: the runtime, which takes it out of its maps and sums up its metrics.
pub(crate) trait RemovedBox: Send + Sync + std::fmt::Debug {
    /// Called once per box, by its driver.
    fn removed(&self, id: &str, metrics: &BoxMetricsSnapshot);
}

/// What a driver publishes.
#[derive(Debug, Clone)]
pub(crate) struct BoxView {
    /// Counts publications.
    pub generation: u64,
    pub phase: Phase,
    pub reason: String,
    pub timers: StageTimers,
    /// The shim and the guest, while the VM is believed to run.
    pub running: Option<Running>,
    pub vmm: VmmKind,
    /// The caller's own data, as last changed.
    pub metadata: Arc<Vec<u8>>,
    pub containers: BTreeMap<String, ContainerSnapshot>,
}

/// The ways into a VM that runs.
#[derive(Debug, Clone)]
pub(crate) struct Running {
    pub shim: ShimController,
    pub session: GuestSession,
}

/// A handle to one box. Cheap to clone; clones are the same box.
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
    /// One per container that is being created, started or removed: these exclude each other.
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
    /// Id.
    pub fn id(&self) -> &str {
        &self.inner.options.id
    }

    /// Name.
    pub fn name(&self) -> &str {
        &self.inner.options.name
    }

    /// Runs the start pipeline, or joins the one that runs; ok at once where the box is ready. Dropping the future
    /// leaves the pipeline running for the others; a later call joins it.
    ///
    /// # Errors
    /// `Start` with the stage and its cause, after which it may be tried again; `Denied` on a stopped box.
    pub async fn start(&self) -> Result<()> {
        if self.view().phase == Phase::Ready {
            return Ok(());
        }
        self.ask(Request::Start).await
    }

    /// Ends the VM and its shim; ok where they have ended. Containers are Exited afterwards. Dropping the future does
    /// not stop the stopping.
    ///
    /// # Errors
    /// Whatever kept the shim from ending; it may be asked again.
    pub async fn stop(&self) -> Result<()> {
        match self.ask(Request::Stop).await {
            Err(RuntimeError::NotFound { .. }) => Ok(()),
            result => result,
        }
    }

    /// Stops it, removes its containers, bundle and record, and forgets it; ok where that was done. Log files stay.
    ///
    /// # Errors
    /// Whatever is left; it may be asked again.
    pub async fn remove(&self) -> Result<()> {
        match self.ask(Request::Remove).await {
            Err(RuntimeError::NotFound { .. }) => Ok(()),
            result => result,
        }
    }

    /// New limits for all containers together, within the VM: OCI LinuxResources as JSON. `describe` then makes the
    /// caller's data anew, which is on disk before the answer. Dropping the future does not stop it.
    ///
    /// # Errors
    /// `BoxGone` without a running VM, `Portal`, `Database`.
    pub async fn update_limits(&self, resources_json: Vec<u8>, describe: Describe) -> Result<()> {
        let this = self.clone();
        self.to_the_end(async move {
            // No container has the box's id.
            let operation = this.operation(this.id());
            let _alone = operation.lock().await;
            this.portal()?.guest().update_pod(resources_json).await?;
            this.send(|reply| Message::Describe { describe, reply })
                .await?
        })
        .await
    }

    /// The box at this moment; never waits.
    pub fn snapshot(&self) -> BoxSnapshot {
        snapshot_of(
            &self.inner.options,
            self.inner.created_at_ns,
            &self.view(),
            &self.inner.metrics,
        )
    }

    /// All containers, by id; never waits.
    pub fn containers(&self) -> Vec<ContainerSnapshot> {
        self.view().containers.values().cloned().collect()
    }

    /// One container by id or unique prefix; never waits.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn container(&self, id: &str) -> Result<ContainerSnapshot> {
        unique("container", id, &self.view().containers).cloned()
    }

    /// Returns once `ready` holds of the published state, or the box is gone. No limit of its own: bound it by the
    /// caller's. May be dropped.
    pub async fn changed_until(&self, mut ready: impl FnMut(&BoxSnapshot) -> bool) {
        let mut view = self.inner.view.clone();
        loop {
            view.borrow_and_update();
            if ready(&self.snapshot()) || view.changed().await.is_err() {
                return;
            }
        }
    }

    /// Counters as last sampled; never waits.
    pub fn metrics(&self) -> BoxMetricsSnapshot {
        self.inner.metrics.snapshot()
    }

    /// The way into the guest.
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
                Phase::Created | Phase::Starting => "it has not started".into(),
                _ if view.reason.is_empty() => "it is stopped".into(),
                _ => view.reason.clone(),
            },
        })
    }

    async fn ask(&self, request: Request) -> Result<()> {
        let answer = self.send(|reply| Message::Ask { request, reply }).await?;
        answer.map_err(RuntimeError::Shared)
    }

    /// Sends a message and waits for its answer. The driver answers every message unless it ends.
    async fn send<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.inner
            .messages
            .send(make(reply))
            .await
            .map_err(|_| self.driver_gone())?;
        answer.await.map_err(|_| self.driver_gone())
    }

    fn driver_gone(&self) -> RuntimeError {
        if self.inner.env.closing.is_cancelled() {
            return RuntimeError::ShuttingDown;
        }
        match self.view().phase {
            Phase::Removed => RuntimeError::NotFound {
                what: "box",
                id: self.id().to_owned(),
            },
            _ => RuntimeError::Denied {
                id: self.id().to_owned(),
                denied: Denied::Removing,
            },
        }
    }

    /// Runs `work` to its end even if the caller leaves: half a container is worse than one nobody waited for.
    async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let (done, answer) = oneshot::channel();
        self.inner.env.tasks.spawn(async move {
            let _ = done.send(work.await);
        });
        answer.await.unwrap_or(Err(RuntimeError::ShuttingDown))
    }

    /// The lock that create, start and remove of one container share.
    fn operation(&self, container_id: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut operations = self.inner.operations.lock();
        // Locks that nobody holds or waits for are forgotten here.
        operations.retain(|_, lock| Arc::strong_count(lock) > 1);
        operations
            .entry(container_id.to_owned())
            .or_default()
            .clone()
    }
}

/// A box as its driver published it.
fn snapshot_of(
    options: &BoxOptions,
    created_at_ns: i64,
    view: &BoxView,
    metrics: &BoxMetrics,
) -> BoxSnapshot {
    let process = view
        .running
        .as_ref()
        .and_then(|running| running.shim.record().process.as_ref());
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

/// ns since the epoch.
pub(crate) fn now_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
