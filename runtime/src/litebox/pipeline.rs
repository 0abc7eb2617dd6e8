//! The start pipeline: a chain of structs consumed by value, each with a `fail` that undoes exactly what exists.
//!
//! ```text
//!  NotStarted ─image─▶ ImageReady ─rootfs─▶ RootfsReady ─spawn─▶ Spawned ─ready─▶ GuestReady
//!                          │                    │                   │
//!                        fail: nothing      fail: bundle        fail: shim, bundle
//! ```
//!
//! Run by the box's driver as one task, once at a time; it never looks at the state machine. The row with phase
//! Starting is on disk before it begins, and the shim's record as soon as it is known ([`ShimNote`]), so a crash at
//! any line is cleaned up by recovery. Cancelled through `cancel`, checked at every wait; the task itself must be
//! driven to its end.

use super::{BoxEnv, Running, teardown};
use crate::error::{Result, RuntimeError};
use crate::filesystem_layout::{private_directory, remove_tree};
use crate::metrics::{Stage, StageTimers};
use crate::shim_controller::{ShimController, ShimRecord};
use crate::types::BoxOptions;
use boxlite_portal::{Connection, GuestAddress, GuestSession};
use boxlite_proto::vmm::{SandboxOptions, VmmKind};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// For the first Ping over the Portal. The shim has had an answer from the guest by then.
const PING_LIMIT: Duration = Duration::from_secs(20);

/// Where the pipeline writes down that a shim exists. The driver's side persists before it answers.
pub(crate) trait ShimNote: Send + Sync {
    /// Persists the record.
    fn note(&self, record: ShimRecord) -> impl Future<Output = Result<()>> + Send;
}

/// What one run needs.
pub(crate) struct Start<N> {
    pub env: Arc<BoxEnv>,
    pub options: BoxOptions,
    pub vmm: VmmKind,
    pub bytes: Arc<AtomicU64>,
    pub cancel: CancellationToken,
    pub note: N,
}

/// Nothing exists.
pub(crate) struct NotStarted<N> {
    start: Start<N>,
    timers: StageTimers,
}

/// Agent and kernel are there; nothing was made.
pub(crate) struct ImageReady<N> {
    start: Start<N>,
    timers: StageTimers,
}

/// The bundle exists.
pub(crate) struct RootfsReady<N> {
    start: Start<N>,
    timers: StageTimers,
}

/// Bundle and shim exist, the sandbox is created and not booted.
pub(crate) struct Spawned<N> {
    start: Start<N>,
    timers: StageTimers,
    shim: ShimController,
}

/// The guest answers.
#[derive(Debug)]
pub(crate) struct GuestReady {
    pub running: Running,
    pub timers: StageTimers,
}

/// Runs the whole chain.
///
/// # Errors
/// `Start` with the stage that failed; nothing is left then, but for what teardown warned about.
pub(crate) async fn run<N: ShimNote>(start: Start<N>) -> Result<GuestReady> {
    let not_started = NotStarted {
        start,
        timers: StageTimers::default(),
    };
    let image = not_started.image().await?;
    let rootfs = image.rootfs().await?;
    let spawned = rootfs.spawn().await?;
    spawned.ready().await
}

impl<N: ShimNote> NotStarted<N> {
    async fn image(mut self) -> Result<ImageReady<N>> {
        let began = Instant::now();
        let checked = self
            .start
            .env
            .init_rootfs
            .check(&self.vmm())
            .and_then(|()| {
                crate::init_rootfs::check_file("the shim", self.start.env.program.path(), true)
            });
        match checked {
            Ok(()) => {
                self.timers.record(Stage::Image.name(), began.elapsed());
                Ok(ImageReady {
                    start: self.start,
                    timers: self.timers,
                })
            }
            Err(reason) => Err(failed(&self.start, Stage::Image, reason)),
        }
    }

    fn vmm(&self) -> VmmKind {
        self.start.vmm.clone()
    }
}

impl<N: ShimNote> ImageReady<N> {
    async fn rootfs(mut self) -> Result<RootfsReady<N>> {
        let began = Instant::now();
        let bundle = self.start.env.layout.bundle(&self.start.options.id);
        let made = self.start.blocking(move || {
            // What an earlier, crashed start left would otherwise be taken for this one's.
            remove_tree(&bundle)?;
            private_directory(&bundle)?;
            private_directory(&bundle.join("c"))
        });
        match made.await {
            Ok(()) => {
                self.timers.record(Stage::Rootfs.name(), began.elapsed());
                Ok(RootfsReady {
                    start: self.start,
                    timers: self.timers,
                })
            }
            Err(reason) => Err(self.fail(reason).await),
        }
    }

    /// A bundle made halfway is all there can be.
    async fn fail(self, reason: RuntimeError) -> RuntimeError {
        remove_bundle(&self.start).await;
        failed(&self.start, Stage::Rootfs, reason)
    }
}

impl<N: ShimNote> RootfsReady<N> {
    async fn spawn(mut self) -> Result<Spawned<N>> {
        let began = Instant::now();
        let id = self.start.options.id.clone();
        let bundle = self.start.env.layout.bundle(&id);
        let spawning = ShimController::spawn(
            &self.start.env.program,
            &id,
            &bundle,
            self.start.vmm.clone(),
        );
        // Not cancelled while the program runs: it is bounded, and a daemon that was just being born would be missed.
        let shim = match spawning.await {
            Ok(shim) => shim,
            Err(reason) => return Err(self.fail(reason).await),
        };
        if let Err(reason) = self.start.note.note(shim.record().clone()).await {
            return Err(self.fail(reason).await);
        }
        let options = self.start.sandbox_options();
        let creating = shim.create_sandbox(&bundle, self.start.options.netns.as_deref(), &options);
        if let Err(reason) = self.start.unless_cancelled(creating).await {
            return Err(self.fail(reason).await);
        }
        self.timers.record(Stage::Spawn.name(), began.elapsed());
        Ok(Spawned {
            start: self.start,
            timers: self.timers,
            shim,
        })
    }

    /// The shim may or may not have come up: its own `delete` finds out from the bundle.
    async fn fail(self, reason: RuntimeError) -> RuntimeError {
        teardown::clean_or_warn(&self.start.env, &self.start.options.id).await;
        remove_bundle(&self.start).await;
        failed(&self.start, Stage::Spawn, reason)
    }
}

impl<N: ShimNote> Spawned<N> {
    async fn ready(mut self) -> Result<GuestReady> {
        let began = Instant::now();
        let address = GuestAddress::of(
            &self.start.vmm,
            self.start.env.layout.vsock(&self.start.options.id),
        );
        let session = GuestSession::counted(Connection::lazy(address), self.start.bytes.clone());
        let booting = async {
            self.shim.start_sandbox(self.start.env.start_limit).await?;
            session.guest().ping(PING_LIMIT).await?;
            Ok(())
        };
        if let Err(reason) = self.start.unless_cancelled(booting).await {
            return Err(self.fail(reason).await);
        }
        self.timers.record(Stage::Ready.name(), began.elapsed());
        // The shim's own stages are for people; a shim that does not tell them is fine.
        if let Ok((_, stages)) = self.shim.sandbox_status().await {
            self.timers.stages.extend(stages);
        }
        Ok(GuestReady {
            running: Running {
                shim: self.shim,
                session,
            },
            timers: self.timers,
        })
    }

    async fn fail(self, reason: RuntimeError) -> RuntimeError {
        teardown::end_shim_or_warn(&self.start.env, &self.start.options.id, Some(&self.shim)).await;
        remove_bundle(&self.start).await;
        failed(&self.start, Stage::Ready, reason)
    }
}

impl<N: ShimNote> Start<N> {
    fn sandbox_options(&self) -> SandboxOptions {
        let options = &self.options;
        SandboxOptions {
            vmm: self.vmm.clone(),
            vcpus: options.vcpus,
            memory_mib: options.memory_mib,
            scratch_bytes: options.scratch_bytes,
            scratch_dir: Some(self.env.layout.scratch_dir().to_owned()),
            acceleration: self.env.acceleration,
            hostname: options.hostname.clone(),
            sysctls: options.sysctls.clone(),
            installation: self.env.init_rootfs.installation().clone(),
            cgroup_parent: options.cgroup_parent.clone(),
            debug_console: options.debug_console,
            host_network: options.host_network,
        }
    }

    async fn unless_cancelled(&self, work: impl Future<Output = Result<()>>) -> Result<()> {
        tokio::select! {
            result = work => result,
            () = self.cancel.cancelled() => Err(RuntimeError::BoxGone {
                id: self.options.id.clone(),
                reason: "it was stopped while it started".into(),
            }),
        }
    }

    async fn blocking(&self, work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        teardown::blocking(work).await
    }
}

async fn remove_bundle<N>(start: &Start<N>) {
    let bundle = start.env.layout.bundle(&start.options.id);
    if let Err(error) = teardown::blocking(move || remove_tree(&bundle)).await {
        tracing::warn!(
            id = start.options.id,
            error = crate::report(&error),
            "bundle of a failed start is left"
        );
    }
}

fn failed<N>(start: &Start<N>, stage: Stage, reason: RuntimeError) -> RuntimeError {
    RuntimeError::Start {
        id: start.options.id.clone(),
        stage,
        source: Arc::new(reason),
    }
}
