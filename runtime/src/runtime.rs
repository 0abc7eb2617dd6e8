//! [`BoxliteRuntime`]: all boxes of a node, implemented by [`RuntimeInnerImpl`].
//!
//! The runtime looks boxes up and registers them; operations are those of [`LiteBox`]. Only [`BoxliteRuntime::open`]
//! waits, for shims. Called by cri-server.

use crate::box_manager::BoxManager;
use crate::box_state::Phase;
use crate::database::{BoxRow, Database};
use crate::error::{ErrorKind, Result, RuntimeError};
use crate::events::{EventHub, Events};
use crate::failpoint;
use crate::filesystem_layout::{FilesystemLayout, check_id};
use crate::id_prefix::unique;
use crate::images::ImageManager;
use crate::init_rootfs::InitRootfs;
use crate::litebox::driver::{self, InitialState};
use crate::litebox::{BoxEnv, LiteBox, RemovalListener, now_ns};
use crate::metrics::{
    BoxMetrics, BoxMetricsSnapshot, RuntimeMetrics, RuntimeMetricsSnapshot, StageTimers,
};
use crate::panics::caught;
use crate::pool::{self, Pool, PoolNetworks, PoolSettings, PoolStatus};
use crate::recovery;
use crate::shim_controller::ShimProgram;
use crate::shim_controller::events::{EventServer, ShimEvent};
use crate::types::{BoxOptions, BoxSnapshot, BoxState, ContainerSnapshot, RuntimeOptions};
use boxlite_sys::file_lock::FileLock;
use boxlite_sys::sync::RwLock;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Interval between two samplings of all boxes' counters; Prometheus scrapes every 15 to 60 s.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(10);
/// VMs sampled concurrently; small, so that sampling does not load the node.
const SAMPLE_CONCURRENCY: usize = 8;
/// Timeout of pending tasks on shutdown.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

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

/// State shared by all handles.
struct RuntimeInnerImpl {
    /// Guards maps only; not held across an await.
    sync_state: RwLock<SyncState>,
    non_sync_state: NonSyncState,
    /// Serializes creations, so that looking up and taking a name and id is atomic.
    creating: tokio::sync::Mutex<()>,
    env: Arc<BoxEnv>,
    events: boxlite_sys::sync::Mutex<Option<EventServer>>,
    /// Held while the runtime is open.
    _lock: FileLock,
}

/// State behind the lock.
struct SyncState {
    boxes: BoxManager,
    images: ImageManager,
}

/// Immutable state, and state with its own synchronization.
struct NonSyncState {
    layout: FilesystemLayout,
    init_rootfs: InitRootfs,
    metrics: RuntimeMetrics,
    /// Boxes whose shim lives and whose record is lost.
    unmanaged: Vec<String>,
    /// Unset if no warm VMs are kept.
    pool: OnceLock<Arc<Pool>>,
}

/// Removes boxes from the maps on behalf of their drivers. Weak, so that a driver does not keep its runtime alive.
#[derive(Default)]
struct RemovalSink {
    runtime: std::sync::OnceLock<Weak<RuntimeInnerImpl>>,
}

impl std::fmt::Debug for RemovalSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RemovalSink")
    }
}

impl RemovalListener for RemovalSink {
    fn removed(&self, id: &str, metrics: &BoxMetricsSnapshot) {
        if let Some(runtime) = self.runtime.get().and_then(Weak::upgrade) {
            runtime.write().boxes.remove(id);
            runtime.non_sync_state.metrics.box_removed(metrics);
        }
    }
}

impl RuntimeInnerImpl {
    fn read(&self) -> RwLockReadGuard<'_, SyncState> {
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
    /// Opens directories, database and images, serves the shims' events, and adopts running boxes; see `recovery`.
    ///
    /// # Errors
    /// `InvalidArgument`, `Io`, `Database`, `Image`; `AlreadyExists` if another process uses the same roots.
    pub async fn open(options: RuntimeOptions) -> Result<Self> {
        let mut layout = FilesystemLayout::new(&options.root, &options.state)?;
        if let Some(directory) = &options.scratch_dir {
            layout = layout.with_scratch_dir(directory)?;
        }
        layout.prepare()?;
        let lock = lock_roots(&layout.lock())?;
        let database = Database::open(&layout)?;
        let images = open_images(&layout, options.registry).await?;
        let init_rootfs = InitRootfs::new(options.installation);
        let removals = Arc::new(RemovalSink::default());
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
            warm: OnceLock::new(),
            removed: removals.clone(),
        });
        let (server, events) = EventServer::start(&layout.events_socket()).await?;
        let (recovered, unmanaged) = recovery::recover(&env).await?;
        let inner = Arc::new(RuntimeInnerImpl {
            sync_state: RwLock::new(SyncState {
                boxes: BoxManager::default(),
                images,
            }),
            non_sync_state: NonSyncState {
                layout,
                init_rootfs,
                metrics: RuntimeMetrics::default(),
                unmanaged,
                pool: OnceLock::new(),
            },
            creating: tokio::sync::Mutex::new(()),
            env: env.clone(),
            events: boxlite_sys::sync::Mutex::new(Some(server)),
            _lock: lock,
        });
        let _ = removals.runtime.set(Arc::downgrade(&inner));
        for initial in recovered {
            // Under the lock, so that a driver that removes its box at once finds it in the map.
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

    /// Registers and persists a box without starting it. If a box with this name exists, returns that box regardless of
    /// the other options. Dropping the future either registers the box or does not.
    ///
    /// # Errors
    /// `InvalidArgument`; `AlreadyExists` if a box of another name has the id; `Database`.
    pub async fn create_box(&self, options: BoxOptions) -> Result<LiteBox> {
        check_options(&options)?;
        let this = self.clone();
        let creating = async move {
            let _guard = this.inner.creating.lock().await;
            this.create_locked(options).await
        };
        // In a task, so that a dropped future cannot leave a row without its box.
        match self.inner.env.tasks.spawn(creating).await {
            Ok(result) => result,
            Err(_) => Err(RuntimeError::ShuttingDown),
        }
    }

    async fn create_locked(&self, options: BoxOptions) -> Result<LiteBox> {
        {
            let state = self.inner.read();
            if let Some(present) = state.boxes.by_name(&options.name) {
                return Ok(present.clone());
            }
            if let Some(present) = state.boxes.by_id(&options.id) {
                return Err(RuntimeError::AlreadyExists {
                    subject: "pod sandbox",
                    id: options.id,
                    reason: format!("it has the name {:?}", present.name()),
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
        let database = &self.inner.env.database;
        let inserting = caught(async {
            failpoint::reach("pod.insert").await?;
            database.insert_box(row.clone()).await?;
            Ok(failpoint::reach("pod.inserted").await?)
        });
        if let Err(error) = inserting.await {
            // A row without a box would keep its name until the next start.
            if let Err(undo) = database.delete_box(&row.options.id).await {
                let id = row.options.id;
                tracing::warn!(
                    id,
                    error = crate::report(&undo),
                    "failed to delete the record of a failed sandbox"
                );
            }
            return Err(error);
        }
        let initial = InitialState {
            row,
            containers: Vec::new(),
            running: None,
            metrics: Arc::new(BoxMetrics::default()),
            recovered: false,
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

    /// Returns the box with this id or unique id prefix, without waiting.
    ///
    /// # Errors
    /// `NotFound`, `AmbiguousId`.
    pub fn get_box(&self, id: &str) -> Result<LiteBox> {
        self.inner.read().boxes.find(id).cloned()
    }

    /// Returns the box with this name, without waiting.
    pub fn find_box_by_name(&self, name: &str) -> Option<LiteBox> {
        self.inner.read().boxes.by_name(name).cloned()
    }

    /// Returns all boxes ordered by id, without waiting.
    pub fn boxes(&self) -> Vec<BoxSnapshot> {
        self.inner.all().iter().map(LiteBox::snapshot).collect()
    }

    /// Returns handles to all boxes ordered by id.
    pub fn handles(&self) -> Vec<LiteBox> {
        self.inner.all()
    }

    /// Returns the container with this id or unique id prefix and its box, without waiting.
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

    /// Returns all containers, without waiting.
    pub fn containers(&self) -> Vec<ContainerSnapshot> {
        self.inner
            .all()
            .iter()
            .flat_map(LiteBox::containers)
            .collect()
    }

    /// Starts to keep warm VMs. Does nothing if they are kept already.
    pub fn start_pool(&self, settings: PoolSettings, networks: Arc<dyn PoolNetworks>) {
        let env = &self.inner.env;
        let pool = Arc::new(Pool::new(settings, networks));
        if env.warm.set(pool.clone()).is_ok() {
            let _ = self.inner.non_sync_state.pool.set(pool.clone());
            env.tasks.spawn(pool::run(env.clone(), pool));
        }
    }

    /// Takes a warm VM for a box with these options, whose id and network namespace do not matter. The box must be created with the
    /// returned id; if it is not, call [`Self::discard_warm`]. `None` if no VM fits.
    pub fn claim_warm(&self, options: &BoxOptions) -> Option<String> {
        self.inner.non_sync_state.pool.get()?.claim(options)
    }

    /// Removes the warm VM of a claim from which no box was started; idempotent.
    pub async fn discard_warm(&self, id: &str) {
        if let Some(pool) = self.inner.non_sync_state.pool.get() {
            pool.discard(&self.inner.env, id).await;
        }
    }

    /// Returns the state of the pool, without waiting; `None` if it is off.
    pub fn pool_status(&self) -> Option<PoolStatus> {
        let pool = self.inner.non_sync_state.pool.get();
        pool.map(|pool| pool.status())
    }

    /// Subscribes to the events of all boxes and containers; see [`crate::events`].
    pub fn events(&self) -> Events {
        self.inner.env.events.subscribe()
    }

    /// Returns the image manager.
    pub fn images(&self) -> ImageManager {
        self.inner.read().images.clone()
    }

    /// Returns the paths.
    pub fn layout(&self) -> &FilesystemLayout {
        &self.inner.non_sync_state.layout
    }

    /// Returns the files that VMs boot from.
    pub fn init_rootfs(&self) -> &InitRootfs {
        &self.inner.non_sync_state.init_rootfs
    }

    /// Returns the totals over all present and removed boxes, without waiting.
    pub fn metrics(&self) -> RuntimeMetricsSnapshot {
        let present = self.inner.all();
        let mut totals = self
            .inner
            .non_sync_state
            .metrics
            .snapshot(present.iter().map(LiteBox::metrics));
        let env = &self.inner.env;
        let unmanaged = self.inner.non_sync_state.unmanaged.len() as u64;
        totals.quarantined = env.database.quarantined() + env.images.quarantined() + unmanaged;
        totals
    }

    /// Returns the ids of boxes that run without a record: both the database and its copies have lost them. They keep
    /// running, with their networks.
    pub fn unmanaged(&self) -> &[String] {
        &self.inner.non_sync_state.unmanaged
    }

    /// Stops the runtime's tasks, waiting for pending operations for a bounded time, and leaves every box running.
    /// Handles return `ShuttingDown` afterwards.
    pub async fn shutdown(self) {
        let env = &self.inner.env;
        env.closing.cancel();
        env.tasks.close();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, env.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                tasks = env.tasks.len(),
                timeout = ?SHUTDOWN_TIMEOUT,
                "tasks did not finish before shutdown"
            );
        }
        let server = self.inner.events.lock().take();
        if let Some(server) = server {
            server.stop().await;
        }
    }
}

fn check_options(options: &BoxOptions) -> Result<()> {
    check_id("pod sandbox id", &options.id)?;
    let refuse = |field, value: String, reason: &str| {
        Err(RuntimeError::InvalidArgument {
            field,
            value,
            reason: reason.to_owned(),
        })
    };
    if options.name.is_empty() {
        return refuse("pod sandbox name", String::new(), "it is empty");
    }
    if options.vcpus == 0 {
        return refuse("vcpus", "0".into(), "at least 1 is required");
    }
    if options.memory_mib == 0 {
        return refuse("memory_mib", "0".into(), "at least 1 is required");
    }
    Ok(())
}

/// Locks the roots against a second runtime.
fn lock_roots(path: &Path) -> Result<FileLock> {
    FileLock::try_acquire(path)
        .map_err(|source| RuntimeError::Io {
            operation: "lock",
            path: path.to_owned(),
            source,
        })?
        .ok_or_else(|| RuntimeError::AlreadyExists {
            subject: "runtime",
            id: path.display().to_string(),
            reason: "another process uses it".into(),
        })
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
            operation: "open the store of",
            kind: ErrorKind::Internal,
            source: Box::new(source),
        })
}

/// Forwards events of shims to their boxes.
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
        // Exits come from Task.Wait at the same moment; only OOM events carry additional information.
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

/// Samples the guests' counters into the boxes' metrics, with a timeout for each VM, and reclaims partial downloads.
async fn sample(runtime: Weak<RuntimeInnerImpl>, closing: CancellationToken) {
    loop {
        tokio::select! {
            () = closing.cancelled() => return,
            () = tokio::time::sleep(SAMPLE_INTERVAL) => {}
        }
        let Some(runtime) = runtime.upgrade() else {
            return;
        };
        if let Err(error) = runtime.env.images.reclaim_partials().await {
            tracing::warn!(
                error = error.report(),
                "failed to reclaim partial downloads"
            );
        }
        let boxes = runtime
            .all()
            .into_iter()
            .filter(|litebox| litebox.snapshot().state == BoxState::Ready);
        let sampling = futures::stream::iter(boxes).for_each_concurrent(
            SAMPLE_CONCURRENCY,
            |litebox| async move {
                if let Err(error) = litebox.stats().await {
                    tracing::debug!(
                        id = litebox.id(),
                        error = crate::report(&error),
                        "failed to sample counters"
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
