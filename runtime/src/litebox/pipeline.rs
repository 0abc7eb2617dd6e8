//! The start pipeline: a chain of structs consumed by value. The `fail` of each stage undoes all stages before it.
//!
//! ```text
//!  NotStarted ─image─▶ ImageReady ─rootfs─▶ RootfsReady ─spawn─▶ Spawned ─ready─▶ GuestReady
//!                          │                    │                   │
//!                        fail: nothing      fail: bundle        fail: shim, bundle
//! ```
//!
//! A box with a warm VM ([`super::WarmVms`]) begins with [`claim`], which replaces all stages; if that fails, the VM is removed and
//! the stages run.
//!
//! The box's driver runs it as one task, at most one at a time; it does not use the state machine. The row with phase
//! Starting is persisted before it begins, and the shim's state as soon as it is known ([`ShimRecorder`]), so recovery
//! can clean up after a crash at any point. It is canceled through the token `cancel`; the task must not be aborted.

use super::{BoxEnv, Running, WarmVms, teardown};
use crate::error::{Result, RuntimeError};
use crate::failpoint;
use crate::filesystem_layout::{private_directory, remove_file, remove_tree};
use crate::metrics::{Stage, StageTimers};
use crate::shim_controller::{ShimController, ShimState};
use crate::types::BoxOptions;
use boxlite_portal::{Connection, GuestAddress, GuestSession};
use boxlite_proto::vmm::{SandboxOptions, VmmKind, VmmUsers, VolumeWriters};
use boxlite_telemetry::{Kind, traced};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Timeout of the first Ping over the Portal. The guest has answered the shim before.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Timeout of StartSandbox for a warm VM, whose kernel and agent run already. A VM that hangs is replaced by a cold boot.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(30);

/// Persists the state of a new shim for the pipeline.
pub(crate) trait ShimRecorder: Send + Sync {
    /// Returns once the state is persisted.
    fn record(&self, state: ShimState) -> impl Future<Output = Result<()>> + Send;
}

/// Input of one run.
pub(crate) struct Start<R> {
    pub env: Arc<BoxEnv>,
    pub options: BoxOptions,
    pub vmm: VmmKind,
    pub bytes: Arc<AtomicU64>,
    pub cancel: CancellationToken,
    pub recorder: R,
}

/// Nothing exists yet.
pub(crate) struct NotStarted<R> {
    start: Start<R>,
    timers: StageTimers,
}

/// Agent and kernel were found; nothing was created.
pub(crate) struct ImageReady<R> {
    start: Start<R>,
    timers: StageTimers,
}

/// The bundle exists.
pub(crate) struct RootfsReady<R> {
    start: Start<R>,
    timers: StageTimers,
}

/// Bundle and shim exist; the sandbox is created but not booted.
pub(crate) struct Spawned<R> {
    start: Start<R>,
    timers: StageTimers,
    shim: ShimController,
}

/// The guest answers.
#[derive(Debug)]
pub(crate) struct GuestReady {
    pub running: Running,
    pub timers: StageTimers,
}

/// Runs all stages.
///
/// # Errors
/// `Start` with the failed stage. All stages are undone then; failures to undo are logged.
pub(crate) async fn run<R: ShimRecorder>(start: Start<R>) -> Result<GuestReady> {
    if let Some((source, shim)) = start.warm() {
        let claimed = traced("claim", Kind::Internal, claim(&start, &shim)).await;
        source.claimed(claimed.is_ok());
        match claimed {
            Ok(ready) => return Ok(ready),
            Err(error) => {
                tracing::warn!(
                    id = start.options.id,
                    error = crate::report(&error),
                    "failed to claim a warm VM, booting another"
                );
                teardown::end_shim_or_warn(&start.env, &start.options.id, Some(&shim)).await;
                remove_bundle(&start).await;
            }
        }
    }
    let not_started = NotStarted {
        start,
        timers: StageTimers::default(),
    };
    let image = not_started.image().await?;
    let rootfs = image.rootfs().await?;
    let spawned = traced("spawn", Kind::Internal, rootfs.spawn()).await?;
    traced("ready", Kind::Internal, spawned.ready()).await
}

/// Makes a warm VM the box's. The caller removes it after an error.
async fn claim<R: ShimRecorder>(start: &Start<R>, shim: &ShimController) -> Result<GuestReady> {
    let began = Instant::now();
    let mut timers = StageTimers::default();
    start.recorder.record(shim.state().clone()).await?;
    // From here on a daemon that dies finds the VM by its row.
    let marker = start.env.layout.warm_marker(&start.options.id);
    start.blocking(move || remove_file(&marker)).await?;
    let bundle = start.env.layout.bundle(&start.options.id);
    let options = sandbox_options(&start.env, &start.options, &start.vmm);
    let creating = shim.create_sandbox(&bundle, start.options.netns.as_deref(), &options);
    start.unless_cancelled(creating).await?;
    timers.record(Stage::Claim.name(), began.elapsed());
    let limit = start.env.start_limit.min(CLAIM_TIMEOUT);
    let session = start.boot(shim, limit, &mut timers).await?;
    Ok(GuestReady {
        running: Running {
            shim: shim.clone(),
            session,
        },
        timers,
    })
}

impl<R: ShimRecorder> NotStarted<R> {
    async fn image(mut self) -> Result<ImageReady<R>> {
        let began = Instant::now();
        let reached = failpoint::reach("pod.image").await;
        let checked = reached
            .map_err(RuntimeError::from)
            .and_then(|()| self.start.env.init_rootfs.check(&self.vmm()))
            .and_then(|()| {
                crate::init_rootfs::check_file("shim", self.start.env.program.path(), true)
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

impl<R: ShimRecorder> ImageReady<R> {
    async fn rootfs(mut self) -> Result<RootfsReady<R>> {
        let began = Instant::now();
        let layout = &self.start.env.layout;
        let bundle = layout.bundle(&self.start.options.id);
        let containers = layout.containers(&self.start.options.id);
        let made = self.start.blocking(move || {
            // Remove the leftovers of a crashed start.
            remove_tree(&bundle)?;
            private_directory(&bundle)?;
            failpoint::hit("pod.bundle")?;
            private_directory(&containers)
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

    /// Removes the bundle, which may be incomplete.
    async fn fail(self, reason: RuntimeError) -> RuntimeError {
        remove_bundle(&self.start).await;
        failed(&self.start, Stage::Rootfs, reason)
    }
}

impl<R: ShimRecorder> RootfsReady<R> {
    async fn spawn(mut self) -> Result<Spawned<R>> {
        let began = Instant::now();
        let id = self.start.options.id.clone();
        let bundle = self.start.env.layout.bundle(&id);
        let spawning = async {
            failpoint::reach("pod.spawn").await?;
            let (program, vmm) = (&self.start.env.program, self.start.vmm.clone());
            let shim = ShimController::spawn(program, &id, &bundle, vmm).await?;
            failpoint::reach("pod.spawned").await?;
            Ok::<_, RuntimeError>(shim)
        };
        // Not canceled while the program runs: it has a timeout, and canceling could miss a shim that is just starting.
        let shim = match spawning.await {
            Ok(shim) => shim,
            Err(reason) => return Err(self.fail(reason).await),
        };
        if let Err(reason) = self.start.recorder.record(shim.state().clone()).await {
            return Err(self.fail(reason).await);
        }
        let options = sandbox_options(&self.start.env, &self.start.options, &self.start.vmm);
        let creating = async {
            failpoint::reach("pod.create").await?;
            let netns = self.start.options.netns.as_deref();
            shim.create_sandbox(&bundle, netns, &options).await
        };
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

    /// Cleans up by the shim's `delete`, which finds out from the bundle whether a shim is running.
    async fn fail(self, reason: RuntimeError) -> RuntimeError {
        teardown::clean_or_warn(&self.start.env, &self.start.options.id).await;
        remove_bundle(&self.start).await;
        failed(&self.start, Stage::Spawn, reason)
    }
}

impl<R: ShimRecorder> Spawned<R> {
    async fn ready(mut self) -> Result<GuestReady> {
        let limit = self.start.env.start_limit;
        let session = match self.start.boot(&self.shim, limit, &mut self.timers).await {
            Ok(session) => session,
            Err(reason) => return Err(self.fail(reason).await),
        };
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

/// Returns the options of a box for its shim.
pub(crate) fn sandbox_options(env: &BoxEnv, options: &BoxOptions, vmm: &VmmKind) -> SandboxOptions {
    SandboxOptions {
        pod: options.pod.clone(),
        vmm: vmm.clone(),
        vcpus: options.vcpus,
        memory_mib: options.memory_mib,
        containers_bytes: options.containers_bytes,
        scratch_bytes: options.scratch_bytes,
        scratch_dir: Some(env.layout.scratch_dir().to_owned()),
        acceleration: env.acceleration,
        hostname: options.hostname.clone(),
        sysctls: options.sysctls.clone(),
        installation: env.init_rootfs.installation().clone(),
        cgroup_parent: options.cgroup_parent.clone(),
        debug_console: options.debug_console,
        host_network: options.host_network,
        passt: options.passt,
        volume_writers: Some(VolumeWriters {
            registry: env.layout.volume_writers(),
            policy: options.shared_volume_writers,
        }),
        vmm_users: options.vmm_ids.map(|ids| VmmUsers {
            registry: env.layout.vmm_users(),
            ids,
        }),
        warm: false,
    }
}

impl<R: ShimRecorder> Start<R> {
    /// Returns the warm VM that was claimed for this box.
    fn warm(&self) -> Option<(Arc<dyn WarmVms>, ShimController)> {
        let source = self.env.warm.get()?;
        let shim = source.take(&self.options.id)?;
        Some((source.clone(), shim))
    }

    /// Boots the VM and waits until the guest answers.
    async fn boot(
        &self,
        shim: &ShimController,
        limit: Duration,
        timers: &mut StageTimers,
    ) -> Result<GuestSession> {
        let began = Instant::now();
        let address = GuestAddress::of(&self.vmm, self.env.layout.vsock(&self.options.id));
        let session = GuestSession::counted(Connection::lazy(address), self.bytes.clone());
        let booting = async {
            failpoint::reach("pod.boot").await?;
            shim.start_sandbox(limit).await?;
            session.guest().ping(PING_TIMEOUT).await?;
            Ok(failpoint::reach("pod.booted").await?)
        };
        self.unless_cancelled(booting).await?;
        timers.record(Stage::Ready.name(), began.elapsed());
        // The shim's stage timers are informational.
        if let Ok((_, stages)) = shim.sandbox_status().await {
            timers.stages.extend(stages);
        }
        Ok(session)
    }

    async fn unless_cancelled(&self, operation: impl Future<Output = Result<()>>) -> Result<()> {
        tokio::select! {
            result = operation => result,
            () = self.cancel.cancelled() => Err(RuntimeError::BoxGone {
                id: self.options.id.clone(),
                reason: "it was stopped while it was starting".into(),
            }),
        }
    }

    async fn blocking(
        &self,
        operation: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<()> {
        teardown::blocking(operation).await
    }
}

async fn remove_bundle<R>(start: &Start<R>) {
    let bundle = start.env.layout.bundle(&start.options.id);
    if let Err(error) = start.env.database.remove_bundle(bundle).await {
        tracing::warn!(
            id = start.options.id,
            error = crate::report(&error),
            "failed to remove the bundle of a failed start"
        );
    }
}

fn failed<R>(start: &Start<R>, stage: Stage, reason: RuntimeError) -> RuntimeError {
    RuntimeError::Start {
        id: start.options.id.clone(),
        stage,
        source: Arc::new(reason),
    }
}
