//! [`BoxliteRuntime`]: all boxes of a node, and [`RuntimeInnerImpl`] behind it.
//!
//! A handle looks a box up and lets go of the lock; all work is the box's own ([`LiteBox`]). Nothing here waits for a
//! VM but [`BoxliteRuntime::open`], and that only for shims. Called by cri-server.

use crate::database::{BoxRow, Database};
use crate::error::{ErrorKind, Result, RuntimeError};
use crate::events::{EventHub, Events};
use crate::filesystem_layout::{FilesystemLayout, check_id};
use crate::images::ImageManager;
use crate::init_rootfs::InitRootfs;
use crate::litebox::driver::{self, Initial};
use crate::litebox::{BoxEnv, LiteBox, RemovedBox, now_ns};
use crate::management::box_manager::{BoxManager, unique};
use crate::management::box_state::Phase;
use crate::metrics::{
    BoxMetrics, BoxMetricsSnapshot, RuntimeMetrics, RuntimeMetricsSnapshot, StageTimers,
};
use crate::recovery;
use crate::shim_controller::ShimProgram;
use crate::shim_controller::events::{EventServer, ShimEvent};
use crate::types::{BoxOptions, BoxSnapshot, BoxState, ContainerSnapshot, RuntimeOptions};
use boxlite_sys::sync::RwLock;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Between two samplings of all boxes' counters; Prometheus scrapes every 15 to 60 s.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(10);
/// VMs asked at a time: the sampler shall not load a node.
const SAMPLES_AT_ONCE: usize = 8;
/// How long shutdown waits for what is under way.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// A handle to the runtime. Cheap to clone.
#[derive(Clone)]
pub struct BoxliteRuntime {
    inner: Arc<RuntimeInnerImpl>,
}

impl std::fmt::Debug for BoxliteRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoxliteRuntime").finish_non_exhaustive()
    }
}

/// What the handles share.
struct RuntimeInnerImpl {
    /// Guards maps only; never held across an await.
    sync_state: RwLock<SyncState>,
    non_sync_state: NonSyncState,
    /// One creation at a time: name and id are looked up and taken in one step.
    creating: tokio::sync::Mutex<()>,
    env: Arc<BoxEnv>,
    events: boxlite_sys::sync::Mutex<Option<EventServer>>,
    /// Held while the runtime is open.
    _lock: File,
}

/// What changes.
struct SyncState {
    boxes: BoxManager,
    images: ImageManager,
}

/// What does not, or locks itself.
struct NonSyncState {
    layout: FilesystemLayout,
    init_rootfs: InitRootfs,
    metrics: RuntimeMetrics,
}

/// The drivers' way back to the maps. Weak: a driver must not keep its runtime.
#[derive(Default)]
struct Departures {
    runtime: std::sync::OnceLock<Weak<RuntimeInnerImpl>>,
}

impl std::fmt::Debug for Departures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Departures")
    }
}

impl RemovedBox for Departures {
    fn removed(&self, id: &str, metrics: &BoxMetricsSnapshot) {
        if let Some(runtime) = self.runtime.get().and_then(Weak::upgrade) {
            runtime.write().boxes.remove(id);
            runtime.non_sync_state.metrics.departed(metrics);
        }
    }
}

impl RuntimeInnerImpl {
    fn read(&self) -> RwLockReadGuard<'_, SyncState> {
        // Maps are changed by single calls, so a panic elsewhere left them whole.
        self.sync_state.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, SyncState> {
        self.sync_state.write()
    }

    fn all(&self) -> Vec<LiteBox> {
        self.read().boxes.all().cloned().collect()
    }
}

impl BoxliteRuntime {
    /// Opens directories, database and images, serves the shims' events, and re-adopts what lives; see `recovery`.
    /// Dropping the future leaves what was recovered so far on disk.
    ///
    /// # Errors
    /// `InvalidArgument`, `Io`, `Database`, `Image`; `AlreadyExists` where another runtime has the roots open.
    pub async fn open(options: RuntimeOptions) -> Result<Self> {
        let mut layout = FilesystemLayout::new(&options.root, &options.state)?;
        if let Some(directory) = &options.scratch_dir {
            layout = layout.with_scratch_dir(directory)?;
        }
        layout.prepare()?;
        let lock = lock_roots(&layout.lock())?;
        let database = Database::open(&layout.database())?;
        let images = open_images(&layout, options.registry).await?;
        let init_rootfs = InitRootfs::new(options.installation);
        let departures = Arc::new(Departures::default());
        let closing = CancellationToken::new();
        let env = Arc::new(BoxEnv {
            program: ShimProgram::new(&options.shim, &layout),
            layout: layout.clone(),
            database,
            init_rootfs: init_rootfs.clone(),
            images: images.clone(),
            vmm: options.vmm,
            acceleration: options.acceleration,
            start_limit: options.start_limit,
            tasks: TaskTracker::new(),
            closing: closing.clone(),
            events: EventHub::new(closing.clone()),
            removed: departures.clone(),
        });
        let (server, events) = EventServer::start(&layout.events_socket()).await?;
        let recovered = recovery::recover(&env).await?;
        let inner = Arc::new(RuntimeInnerImpl {
            sync_state: RwLock::new(SyncState {
                boxes: BoxManager::default(),
                images,
            }),
            non_sync_state: NonSyncState {
                layout,
                init_rootfs,
                metrics: RuntimeMetrics::default(),
            },
            creating: tokio::sync::Mutex::new(()),
            env: env.clone(),
            events: boxlite_sys::sync::Mutex::new(Some(server)),
            _lock: lock,
        });
        let _ = departures.runtime.set(Arc::downgrade(&inner));
        for initial in recovered {
            // Under the lock, so that a driver that removes its box at once finds it in the maps.
            let mut state = inner.write();
            state.boxes.insert(driver::launch(env.clone(), initial));
        }
        env.tasks.spawn(dispatch(
            Arc::downgrade(&inner),
            events,
            env.closing.clone(),
        ));
        env.tasks
            .spawn(sample(Arc::downgrade(&inner), env.closing.clone()));
        Ok(Self { inner })
    }

    /// Registers a box and writes it down; starts nothing. A name that a box has already: that box, whatever the
    /// other options say. Dropping the future registers it or does not.
    ///
    /// # Errors
    /// `InvalidArgument`; `AlreadyExists` where the id belongs to a box of another name; `Database`.
    pub async fn create_box(&self, options: BoxOptions) -> Result<LiteBox> {
        check_options(&options)?;
        let this = self.clone();
        let creating = async move {
            let _alone = this.inner.creating.lock().await;
            this.create_alone(options).await
        };
        // In a task, so that a row is never written without its box.
        match self.inner.env.tasks.spawn(creating).await {
            Ok(result) => result,
            Err(_) => Err(RuntimeError::ShuttingDown),
        }
    }

    async fn create_alone(&self, options: BoxOptions) -> Result<LiteBox> {
        {
            let state = self.inner.read();
            if let Some(present) = state.boxes.by_name(&options.name) {
                return Ok(present.clone());
            }
            if let Some(present) = state.boxes.by_id(&options.id) {
                return Err(RuntimeError::AlreadyExists {
                    what: "box",
                    id: options.id,
                    reason: format!("its name is {:?}", present.name()),
                });
            }
        }
        if self.inner.env.closing.is_cancelled() {
            return Err(RuntimeError::ShuttingDown);
        }
        let row = BoxRow {
            options,
            phase: Phase::Created,
            reason: String::new(),
            created_at_ns: now_ns(),
            shim: None,
            timers: StageTimers::default(),
        };
        self.inner.env.database.insert_box(row.clone()).await?;
        let initial = Initial {
            row,
            containers: Vec::new(),
            running: None,
            metrics: Arc::new(BoxMetrics::default()),
            found: false,
        };
        let mut state = self.inner.write();
        let litebox = driver::launch(self.inner.env.clone(), initial);
        state.boxes.insert(litebox.clone());
        self.inner
            .non_sync_state
            .metrics
            .boxes_created
            .fetch_add(1, Ordering::Relaxed);
        Ok(litebox)
    }

    /// A box by id or unique prefix; never waits.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn get_box(&self, id: &str) -> Result<LiteBox> {
        self.inner.read().boxes.find(id).cloned()
    }

    /// A box by name; never waits.
    pub fn find_box_by_name(&self, name: &str) -> Option<LiteBox> {
        self.inner.read().boxes.by_name(name).cloned()
    }

    /// All boxes, by id; never waits for a VM.
    pub fn boxes(&self) -> Vec<BoxSnapshot> {
        self.inner.all().iter().map(LiteBox::snapshot).collect()
    }

    /// Handles to all boxes, by id.
    pub fn handles(&self) -> Vec<LiteBox> {
        self.inner.all()
    }

    /// A container by id or unique prefix, with its box; never waits for a VM.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn find_container(&self, id: &str) -> Result<(LiteBox, ContainerSnapshot)> {
        let mut containers = BTreeMap::new();
        for litebox in self.inner.all() {
            for container in litebox.containers() {
                containers.insert(container.id.clone(), (litebox.clone(), container));
            }
        }
        unique("container", id, &containers).cloned()
    }

    /// All containers; never waits for a VM.
    pub fn containers(&self) -> Vec<ContainerSnapshot> {
        self.inner
            .all()
            .iter()
            .flat_map(LiteBox::containers)
            .collect()
    }

    /// Follows what happens to all boxes and containers from now on; see [`crate::events`].
    pub fn events(&self) -> Events {
        self.inner.env.events.follow()
    }

    /// The image store.
    pub fn images(&self) -> ImageManager {
        self.inner.read().images.clone()
    }

    /// Paths.
    pub fn layout(&self) -> &FilesystemLayout {
        &self.inner.non_sync_state.layout
    }

    /// What VMs boot from.
    pub fn init_rootfs(&self) -> &InitRootfs {
        &self.inner.non_sync_state.init_rootfs
    }

    /// Totals over all boxes, present and gone; never waits.
    pub fn metrics(&self) -> RuntimeMetricsSnapshot {
        let present = self.inner.all();
        self.inner
            .non_sync_state
            .metrics
            .snapshot(present.iter().map(LiteBox::metrics))
    }

    /// Ends the runtime's tasks, giving what is under way a bounded time, and leaves every box running. Handles
    /// answer `ShuttingDown` from then on.
    pub async fn shutdown(self) {
        let env = &self.inner.env;
        env.closing.cancel();
        env.tasks.close();
        if tokio::time::timeout(SHUTDOWN_LIMIT, env.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                tasks = env.tasks.len(),
                "tasks were still at work after {SHUTDOWN_LIMIT:?}"
            );
        }
        let server = self.inner.events.lock().take();
        if let Some(server) = server {
            server.stop().await;
        }
    }
}

fn check_options(options: &BoxOptions) -> Result<()> {
    check_id("box id", &options.id)?;
    let refuse = |field, value: String, reason: &str| {
        Err(RuntimeError::InvalidArgument {
            field,
            value,
            reason: reason.to_owned(),
        })
    };
    if options.name.is_empty() {
        return refuse("box name", String::new(), "a box needs a name");
    }
    if options.vcpus == 0 {
        return refuse("vcpus", "0".into(), "a VM needs at least one");
    }
    if options.memory_mib == 0 {
        return refuse("memory_mib", "0".into(), "a VM needs memory");
    }
    Ok(())
}

/// Keeps a second runtime off the roots; the kernel lets go of the lock with the process.
fn lock_roots(path: &Path) -> Result<File> {
    let io = |source| RuntimeError::Io {
        what: "cannot lock",
        path: path.to_owned(),
        source,
    };
    let file = File::options()
        .append(true)
        .create(true)
        .open(path)
        .map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(RuntimeError::AlreadyExists {
            what: "runtime",
            id: path.display().to_string(),
            reason: "another process has it open".into(),
        }),
        Err(std::fs::TryLockError::Error(source)) => Err(io(source)),
    }
}

async fn open_images(
    layout: &FilesystemLayout,
    options: crate::images::RegistryOptions,
) -> Result<ImageManager> {
    let directory = layout.images();
    ImageManager::open(&directory, options)
        .await
        .map_err(|source| RuntimeError::Image {
            image: directory.display().to_string(),
            what: "store cannot be opened",
            kind: ErrorKind::Internal,
            source: Box::new(source),
        })
}

/// Hands shims' events to their boxes.
async fn dispatch(
    runtime: Weak<RuntimeInnerImpl>,
    mut events: mpsc::Receiver<ShimEvent>,
    closing: CancellationToken,
) {
    loop {
        let event = tokio::select! {
            () = closing.cancelled() => return,
            event = events.recv() => event,
        };
        let Some(event) = event else { return };
        // Exits are waited for by Task.Wait, which answers at the same moment; only the cause is news.
        let ShimEvent::Oom { container_id } = event else {
            continue;
        };
        let Some(runtime) = runtime.upgrade() else {
            return;
        };
        let owner = runtime
            .all()
            .into_iter()
            .find(|litebox| litebox.container(&container_id).is_ok());
        if let Some(litebox) = owner {
            litebox.note_oom(&container_id).await;
        }
    }
}

/// Brings the guests' counters to the boxes' metrics, each VM within its own deadline.
async fn sample(runtime: Weak<RuntimeInnerImpl>, closing: CancellationToken) {
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            () = tokio::time::sleep(SAMPLE_INTERVAL) => {}
        }
        let Some(runtime) = runtime.upgrade() else {
            return;
        };
        let boxes = runtime
            .all()
            .into_iter()
            .filter(|litebox| litebox.snapshot().state == BoxState::Ready);
        let sampling = futures::stream::iter(boxes).for_each_concurrent(
            SAMPLES_AT_ONCE,
            |litebox| async move {
                if let Err(error) = litebox.stats().await {
                    tracing::debug!(
                        id = litebox.id(),
                        error = crate::report(&error),
                        "counters are stale"
                    );
                }
            },
        );
        tokio::select! {
            () = closing.cancelled() => return,
            () = sampling => {}
        }
    }
}
