//! Container operations of a [`LiteBox`]: create, start, stop, remove, update, reopen the log.
//!
//! Each operation runs to completion even if its caller goes away, and changes rows only through the driver. The shim
//! carries them out (Task API); exits are reported by the driver's watchers.
//!
//! ```text
//!  (Unknown: being created) ─▶ Created ─start─▶ Running ─exit─▶ Exited ─remove─▶ gone
//!                                 └──── start failed: StartError, 128 ───▲
//! ```

use super::driver::{Change, Message};
use super::images::image_error;
use super::{LiteBox, UpdateMetadata, now_ns, teardown};
use crate::database::ContainerRow;
use crate::error::{Result, RuntimeError};
use crate::failpoint;
use crate::filesystem_layout::{check_id, private_directory};
use crate::panics::caught;
use crate::shim_controller::{ShimController, TaskCreate, TaskState};
use crate::types::{ContainerOptions, ContainerSnapshot, ContainerState, ContainerUser, PidMode};
use boxlite_proto::names;
use boxlite_sys::report::report;
use oci_spec::runtime::Spec;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Exit code of a container whose start failed, as in containerd.
const START_ERROR_EXIT_CODE: i32 = 128;
/// Timeout for a container's exit after SIGKILL. Generous, since a guest under emulation and load is slow.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for the guest to accept SIGKILL, so that stopping a container of a silent guest takes less than 10 s beyond the grace
/// period. Stopping the pod ends such a guest.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(8);
const SIGKILL: i32 = 9;
/// Maximum number of supplemental groups taken from a guest's answer; the agent sets no more either.
const MAX_SUPPLEMENTAL_GROUPS: usize = 1024;

impl LiteBox {
    /// Creates a container, after starting the box if necessary. For an existing id returns the existing container.
    ///
    /// Dropping the future does not cancel the creation; a later call with the same id waits for it. A failed creation
    /// is undone.
    ///
    /// # Errors
    /// `Image` if the image is not found locally, `AlreadyExists` if the name is taken, `Denied` for a stopped box,
    /// those of [`Self::start`], `Shim`, `Portal`.
    pub async fn create_container(&self, options: ContainerOptions) -> Result<ContainerSnapshot> {
        check_id("container id", &options.id)?;
        let this = self.clone();
        self.run_to_completion(async move {
            let operation = this.operation(&options.id);
            let _guard = operation.lock().await;
            this.create_locked(options).await
        })
        .await
    }

    async fn create_locked(&self, options: ContainerOptions) -> Result<ContainerSnapshot> {
        // Hold the images first, so that they cannot be removed meanwhile. `forget` releases them.
        let env = &self.inner.env;
        let mut images = vec![options.image_id.clone()];
        images.extend(super::images::volumes(&options.spec));
        let held = env.hold_images(&images, &options.id)?;
        let created = caught(self.create_held(&options, &held)).await;
        if created.is_err() {
            match self.exact(&options.id) {
                // Registered, and not complete.
                Ok(container) if container.state == ContainerState::Unknown => {
                    self.undo_create(&options.id).await;
                }
                // The hold belongs to a container that existed before.
                Ok(_) => {}
                Err(_) => env.release(&held, &options.id),
            }
        }
        created
    }

    /// Creates a container whose images are held. The caller undoes a failure.
    async fn create_held(
        &self,
        options: &ContainerOptions,
        held: &[String],
    ) -> Result<ContainerSnapshot> {
        failpoint::reach("container.hold").await?;
        let row = Box::new(new_row(self.id(), options, held));
        let admitted = self.send(|reply| Message::Admit { row, reply }).await??;
        if admitted.complete {
            return Ok(admitted.snapshot);
        }
        self.make_task(options, &held[0]).await?;
        let user = self.user_of(&options.id).await;
        self.change(&options.id, |row| {
            row.complete = true;
            row.snapshot.user = user;
            row.snapshot.state = ContainerState::Created;
        })
        .await
    }

    async fn make_task(&self, options: &ContainerOptions, image_id: &str) -> Result<()> {
        self.start().await?;
        let running = self.running()?;
        let layers = self
            .inner
            .env
            .images
            .overlay_layers(image_id)
            .map_err(|source| image_error(image_id, "find the layers of", source))?;
        let bundle = self
            .inner
            .env
            .layout
            .container_bundle(self.id(), &options.id);
        let config = self
            .inner
            .env
            .layout
            .container_config(self.id(), &options.id);
        let mut spec = spec_of(options);
        self.inner.env.name_layers(&mut spec)?;
        let spec = serde_json::to_vec(&spec).map_err(|error| RuntimeError::Internal {
            detail: format!("failed to encode the OCI spec: {error}"),
        })?;
        let made = bundle.clone();
        teardown::blocking(move || write_bundle(&made, &config, &spec)).await?;
        failpoint::reach("container.bundle").await?;
        let create = TaskCreate {
            id: options.id.clone(),
            bundle,
            layers: layers.into_iter().map(|layer| layer.path).collect(),
            log_path: options.log_path.clone(),
            terminal: options.tty,
        };
        failpoint::reach("container.create").await?;
        running.shim.create_task(&create).await?;
        Ok(failpoint::reach("container.created").await?)
    }

    /// Returns the user that a new container runs as. Informational: a failure does not fail the creation.
    async fn user_of(&self, id: &str) -> Option<ContainerUser> {
        let listed = match self.portal() {
            Ok(session) => session
                .container()
                .list(Some(id))
                .await
                .map_err(RuntimeError::from),
            Err(error) => Err(error),
        };
        let list = listed
            .inspect_err(|error| {
                tracing::warn!(
                    id,
                    error = report(error),
                    "failed to get the user of a container"
                );
            })
            .ok()?;
        let user = list
            .into_iter()
            .find(|info| info.container_id == id)?
            .user?;
        let mut supplemental_groups = user.supplemental_groups;
        supplemental_groups.truncate(MAX_SUPPLEMENTAL_GROUPS);
        Some(ContainerUser {
            uid: user.uid,
            gid: user.gid,
            supplemental_groups,
        })
    }

    /// Undoes a failed creation in reverse order.
    async fn undo_create(&self, id: &str) {
        if let Ok(running) = self.running()
            && let Err(error) = running.shim.delete_task(id).await
        {
            tracing::warn!(
                id,
                error = report(&error),
                "failed to delete the task of a failed creation"
            );
        }
        if let Err(error) = self.forget(id).await {
            tracing::warn!(
                id,
                error = report(&error),
                "partially created container could not be removed"
            );
        }
    }

    /// Starts a created container; idempotent.
    ///
    /// # Errors
    /// `ContainerState` if it has exited; `Shim` if the guest cannot start it, after which it is Exited with the reason
    /// StartError and exit code 128.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (this, id) = (self.clone(), id.to_owned());
        self.run_to_completion(async move {
            let operation = this.operation(&id);
            let _guard = operation.lock().await;
            this.start_locked(&id).await
        })
        .await
    }

    async fn start_locked(&self, id: &str) -> Result<()> {
        let wrong = |reason| {
            move |state| RuntimeError::ContainerState {
                id: id.to_owned(),
                state,
                reason,
            }
        };
        match self.exact(id)?.state {
            ContainerState::Created => {}
            ContainerState::Running => return Ok(()),
            state @ ContainerState::Exited => {
                return Err(wrong("an exited container cannot be started again")(state));
            }
            state @ ContainerState::Unknown => {
                return Err(wrong("its creation has not completed")(state));
            }
        }
        let shim = self.running()?.shim;
        let requested_at = now_ns();
        let result = async {
            failpoint::reach("container.start").await?;
            shim.start_task(id).await?;
            Ok(failpoint::reach("container.started").await?)
        };
        let result: Result<()> = result.await;
        if let Err(error) = result
            && !runs_after_all(&shim, id, &error).await
        {
            let message = report(&error);
            let exited = self.note(id, move |row| {
                let snapshot = &mut row.snapshot;
                // The VM may have died meanwhile; then the exit is recorded already.
                if snapshot.state == ContainerState::Created {
                    snapshot.state = ContainerState::Exited;
                    snapshot.exit_code = START_ERROR_EXIT_CODE;
                    snapshot.reason = "StartError".to_owned();
                    snapshot.message = message;
                    snapshot.finished_at_ns = now_ns();
                }
            });
            if let Err(error) = exited.await {
                tracing::warn!(
                    id,
                    error = report(&error),
                    "failed to record a failed start"
                );
            }
            return Err(error);
        }
        self.note(id, move |row| {
            let snapshot = &mut row.snapshot;
            if snapshot.state == ContainerState::Created {
                snapshot.state = ContainerState::Running;
            }
            // The time of the request, not of the response: a short container may have exited by then.
            snapshot.started_at_ns = requested_at;
            if snapshot.finished_at_ns > 0 {
                snapshot.finished_at_ns = snapshot.finished_at_ns.max(requested_at);
            }
        })
        .await
        .map(drop)
    }

    /// Sends `signal` (a Linux signal number), waits up to `grace`, then kills all processes of the container; returns
    /// once it has exited. Does nothing if it does not run.
    ///
    /// Concurrent calls are independent: the one with the shorter grace period kills first. Dropping the future does
    /// not take back signals.
    ///
    /// # Errors
    /// `NotFound`, `Deadline` if it survives SIGKILL, or if the guest does not answer.
    pub async fn stop_container(&self, id: &str, grace: Duration, signal: i32) -> Result<()> {
        if self.exact(id)?.state != ContainerState::Running {
            return Ok(());
        }
        if !grace.is_zero() {
            // The delivery is part of the grace period: a guest that does not answer must not extend it.
            let delivered = async {
                let _logged = self.signal(id, signal, false).await;
                std::future::pending::<()>().await;
            };
            let ended = async {
                tokio::select! {
                    () = self.ended(id) => {}
                    () = delivered => {}
                }
            };
            if tokio::time::timeout(grace, ended).await.is_ok() {
                return Ok(());
            }
        }
        self.kill_and_wait(id).await
    }

    async fn kill_and_wait(&self, id: &str) -> Result<()> {
        let began = Instant::now();
        let ended = self.ended(id);
        tokio::pin!(ended);
        let delivered = self.signal(id, SIGKILL, true);
        let delivered = tokio::select! {
            () = &mut ended => return Ok(()),
            delivered = tokio::time::timeout(DELIVERY_TIMEOUT, delivered) => {
                delivered.map_err(|_| RuntimeError::Deadline {
                    detail: format!("the guest did not answer to SIGKILL for container {id:?}"),
                    limit: DELIVERY_TIMEOUT,
                })?
            }
        };
        // A guest that refuses to signal is treated as one that does not answer: only an exit of another cause can follow.
        let limit = match &delivered {
            Ok(()) => KILL_TIMEOUT,
            Err(_) => DELIVERY_TIMEOUT.saturating_sub(began.elapsed()),
        };
        if tokio::time::timeout(limit, ended).await.is_ok() {
            return Ok(());
        }
        delivered?;
        Err(RuntimeError::Deadline {
            detail: format!("container {id:?} did not exit after SIGKILL"),
            limit,
        })
    }

    /// Sends a signal. A failure is logged, because the wait that follows detects a container that keeps running.
    async fn signal(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        let result = match self.running() {
            Ok(running) => running.shim.kill_task(id, signal, all).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &result {
            tracing::debug!(
                id,
                signal,
                error = report(error),
                "failed to deliver signal"
            );
        }
        result
    }

    /// Waits until the container is not running or is removed.
    async fn ended(&self, id: &str) {
        let mut view = self.inner.view.clone();
        let running = |c: &ContainerSnapshot| c.state == ContainerState::Running;
        // An error means that the driver returned: the box was removed, or the runtime shuts down.
        let _ = view
            .wait_for(|view| !view.containers.get(id).is_some_and(running))
            .await;
    }

    /// Kills a container if it runs, and removes everything but its log file; idempotent.
    ///
    /// # Errors
    /// The reason why something could not be removed; the call may be retried.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let (this, id) = (self.clone(), id.to_owned());
        self.run_to_completion(async move {
            let operation = this.operation(&id);
            let _guard = operation.lock().await;
            this.remove_locked(&id).await
        })
        .await
    }

    async fn remove_locked(&self, id: &str) -> Result<()> {
        let Ok(snapshot) = self.exact(id) else {
            return Ok(());
        };
        if snapshot.state == ContainerState::Running {
            self.kill_and_wait(id).await?;
        }
        failpoint::reach("container.delete").await?;
        if let Ok(running) = self.running() {
            match running.shim.delete_task(id).await {
                // The VM died, and the task with it.
                Err(error) if self.running().is_err() => {
                    tracing::debug!(
                        id,
                        error = report(&error),
                        "VM died before the task was deleted"
                    )
                }
                result => result?,
            }
        }
        failpoint::reach("container.deleted").await?;
        self.forget(id).await
    }

    /// Removes the bundle, then the row; the driver releases the images.
    async fn forget(&self, id: &str) -> Result<()> {
        let env = &self.inner.env;
        let bundle = env.layout.container_bundle(self.id(), id);
        env.database.remove_bundle(bundle).await?;
        failpoint::reach("container.unbundle").await?;
        match self
            .send(|reply| Message::Forget {
                id: id.to_owned(),
                reply,
            })
            .await
        {
            // The box was removed meanwhile, with all its rows.
            Err(RuntimeError::NotFound { .. }) => Ok(()),
            answer => answer?,
        }
    }

    /// Updates the limits of a container, given as OCI LinuxResources in JSON. `update_metadata` then computes the
    /// caller's new data, which is persisted before this returns. Updates of one container are serialized; dropping the
    /// future does not cancel one.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState` if it has exited, `Shim`.
    pub async fn update_container(
        &self,
        id: &str,
        resources_json: Vec<u8>,
        update_metadata: UpdateMetadata,
    ) -> Result<()> {
        let (this, id) = (self.clone(), id.to_owned());
        self.run_to_completion(async move {
            let operation = this.operation(&id);
            let _guard = operation.lock().await;
            this.update_locked(&id, resources_json).await?;
            let described = this.change(&id, move |row| {
                row.snapshot.metadata = update_metadata(&row.snapshot.metadata);
            });
            described.await.map(drop)
        })
        .await
    }

    async fn update_locked(&self, id: &str, resources_json: Vec<u8>) -> Result<()> {
        match self.exact(id)?.state {
            ContainerState::Created | ContainerState::Running => {}
            state @ (ContainerState::Exited | ContainerState::Unknown) => {
                return Err(RuntimeError::ContainerState {
                    id: id.to_owned(),
                    state,
                    reason: "resources can only be updated while it is created or running",
                });
            }
        }
        self.running()?.shim.update_task(id, resources_json).await
    }

    /// Makes the shim reopen a container's log after the kubelet has rotated it.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState` unless it is running, `Shim`.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let state = self.exact(id)?.state;
        if state != ContainerState::Running {
            return Err(RuntimeError::ContainerState {
                id: id.to_owned(),
                state,
                reason: "reopening the log needs a running container",
            });
        }
        self.running()?.shim.reopen_log(id).await
    }

    /// Returns the container with exactly this id.
    pub(super) fn exact(&self, id: &str) -> Result<ContainerSnapshot> {
        self.view()
            .containers
            .get(id)
            .cloned()
            .ok_or_else(|| RuntimeError::NotFound {
                subject: "container",
                id: id.to_owned(),
            })
    }

    /// Changes the row of a container, persisted before it is published.
    async fn change(
        &self,
        id: &str,
        change: impl FnOnce(&mut ContainerRow) + Send + 'static,
    ) -> Result<ContainerSnapshot> {
        self.send_change(id, Box::new(change), false).await
    }

    /// As [`Self::change`], for facts that hold even if they cannot be persisted: the next start learns them from the shim.
    async fn note(
        &self,
        id: &str,
        change: impl FnOnce(&mut ContainerRow) + Send + 'static,
    ) -> Result<ContainerSnapshot> {
        self.send_change(id, Box::new(change), true).await
    }

    async fn send_change(&self, id: &str, change: Change, fact: bool) -> Result<ContainerSnapshot> {
        let id = id.to_owned();
        self.send(|reply| Message::Change {
            id,
            change,
            fact,
            reply,
        })
        .await?
    }

    /// Records an OOM event of a shim.
    pub(crate) async fn note_oom(&self, id: &str) {
        // A driver that has returned needs no event.
        let _ = self
            .inner
            .messages
            .send(Message::Oom { id: id.to_owned() })
            .await;
    }
}

/// Returns true if the container was started although the response was lost.
async fn runs_after_all(shim: &ShimController, id: &str, error: &RuntimeError) -> bool {
    let refused = matches!(error, RuntimeError::Shim { .. });
    !refused
        && matches!(
            shim.task_state(id).await,
            Ok(TaskState::Running | TaskState::Stopped(_))
        )
}

/// Returns the row of a new container that uses `images`, the root image first.
fn new_row(box_id: &str, options: &ContainerOptions, images: &[String]) -> ContainerRow {
    ContainerRow {
        snapshot: ContainerSnapshot {
            id: options.id.clone(),
            box_id: box_id.to_owned(),
            name: options.name.clone(),
            image_id: images.first().cloned().unwrap_or_default(),
            image_volumes: images.iter().skip(1).cloned().collect(),
            state: ContainerState::Unknown,
            created_at_ns: now_ns(),
            started_at_ns: 0,
            finished_at_ns: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            metadata: options.metadata.clone(),
            log_path: options.log_path.clone(),
            tty: options.tty,
            stdin: options.stdin,
            stdin_once: options.stdin_once,
            user: None,
        },
        complete: false,
        oom: false,
    }
}

/// Returns the caller's spec with annotations for the shim in place of missing OCI fields.
fn spec_of(options: &ContainerOptions) -> Spec {
    let mut spec = options.spec.clone();
    if options.read_only_rootfs {
        let mut root = spec.root().clone().unwrap_or_default();
        root.set_readonly(Some(true));
        spec.set_root(Some(root));
    }
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    let pid_mode = match options.pid_mode {
        PidMode::Container => "container".to_owned(),
        PidMode::Pod => "pod".to_owned(),
        PidMode::Target => format!("target:{}", options.pid_target),
        PidMode::Node => "node".to_owned(),
    };
    annotations.insert(names::PID_MODE_ANNOTATION.to_owned(), pid_mode);
    if options.stdin {
        let stdin = if options.stdin_once { "once" } else { "keep" };
        annotations.insert(names::STDIN_ANNOTATION.to_owned(), stdin.to_owned());
    }
    spec.set_annotations(Some(annotations));
    spec
}

/// Creates the container's bundle. The mode is 0600 because the spec contains environment variables.
fn write_bundle(bundle: &Path, config: &PathBuf, spec: &[u8]) -> Result<()> {
    private_directory(bundle)?;
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(config)?;
        file.write_all(spec)
    };
    write().map_err(|source| RuntimeError::Io {
        operation: "write",
        path: config.clone(),
        source,
    })
}
