//! What a [`LiteBox`] does with its containers: create, start, stop, remove, update, reopen the log.
//!
//! Each operation runs to its end even if its caller leaves, and changes rows only through the driver. The shim does
//! the work (Task API); exits come back through the driver's watchers.
//!
//! ```text
//!  (Unknown: being created) ─▶ Created ─start─▶ Running ─exit─▶ Exited ─remove─▶ gone
//!                                 └──── start failed: StartError, 128 ───▲
//! ```

use super::driver::{Change, Message};
use super::{Describe, LiteBox, now_ns, teardown};
use crate::database::ContainerRow;
use crate::error::{ErrorKind, Result, RuntimeError};
use crate::filesystem_layout::{check_id, private_directory, remove_tree};
use crate::images::{ImageError, ImageErrorKind};
use crate::shim_controller::{ShimController, TaskCreate, TaskState};
use crate::types::{ContainerOptions, ContainerSnapshot, ContainerState, ContainerUser, PidMode};
use boxlite_proto::names;
use boxlite_sys::report::report;
use oci_spec::runtime::Spec;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Exit code of a container whose start failed; containerd's.
const START_ERROR: i32 = 128;
/// How long a container may take to go after SIGKILL: its cgroup empties, its exit travels here. A guest under
/// emulation and load is slow.
const KILL_LIMIT: Duration = Duration::from_secs(30);
const SIGKILL: i32 = 9;
/// Supplemental groups kept of what a guest answers; its agent gives a process no more.
const GROUP_LIMIT: usize = 1024;

impl LiteBox {
    /// Creates a container, starting the box first if it has not started. The same id again answers what is there.
    ///
    /// Dropping the future does not stop the creation; a later call with the same id waits for it. A failed creation
    /// leaves nothing.
    ///
    /// # Errors
    /// `Image` where the image is not here, `AlreadyExists` where the name is taken, `Denied` on a stopped box, those
    /// of [`Self::start`], `Shim`, `Portal`.
    pub async fn create_container(&self, options: ContainerOptions) -> Result<ContainerSnapshot> {
        check_id("container id", &options.id)?;
        let this = self.clone();
        self.to_the_end(async move {
            let operation = this.operation(&options.id);
            let _alone = operation.lock().await;
            this.create_locked(options).await
        })
        .await
    }

    async fn create_locked(&self, options: ContainerOptions) -> Result<ContainerSnapshot> {
        // First: from here on the image cannot go. Forgetting the row lets go of it.
        let env = &self.inner.env;
        let mut wanted = vec![options.image_id.clone()];
        wanted.extend(super::images::volumes(&options.spec));
        let held = env.hold_images(&wanted, &options.id)?;
        let row = new_row(self.id(), &options, &held);
        let admitted = match self
            .send(|reply| Message::Admit {
                row: Box::new(row),
                reply,
            })
            .await
        {
            Ok(Ok(admitted)) => admitted,
            Ok(Err(error)) | Err(error) => {
                // Unless it is the hold of a container that was there before.
                if self.container(&options.id).is_err() {
                    env.release(&held, &options.id);
                }
                return Err(error);
            }
        };
        if admitted.complete {
            return Ok(admitted.snapshot);
        }
        match self.make_task(&options, &held[0]).await {
            Ok(()) => {
                let user = self.user_of(&options.id).await;
                self.change(&options.id, |row| {
                    row.complete = true;
                    row.snapshot.user = user;
                    row.snapshot.state = ContainerState::Created;
                })
                .await
            }
            Err(error) => {
                self.undo_create(&options.id).await;
                Err(error)
            }
        }
    }

    async fn make_task(&self, options: &ContainerOptions, image_id: &str) -> Result<()> {
        self.start().await?;
        let running = self.running()?;
        let layers = self
            .inner
            .env
            .images
            .layers(image_id)
            .map_err(|source| image_error(image_id, "has no layers", source))?;
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
            what: format!("OCI spec cannot be written: {error}"),
        })?;
        let made = bundle.clone();
        teardown::blocking(move || write_bundle(&made, &config, &spec)).await?;
        let create = TaskCreate {
            id: options.id.clone(),
            bundle,
            layers: layers.into_iter().map(|layer| layer.path).collect(),
            log_path: options.log_path.clone(),
            terminal: options.tty,
        };
        running.shim.create_task(&create).await.map(drop)
    }

    /// Whom a new container runs as. Only for show: it is no failure of the create where the guest does not say.
    async fn user_of(&self, id: &str) -> Option<ContainerUser> {
        let asked = match self.portal() {
            Ok(session) => session
                .container()
                .list(Some(id))
                .await
                .map_err(RuntimeError::from),
            Err(error) => Err(error),
        };
        let list = asked
            .inspect_err(|error| tracing::warn!(id, error = report(error), "user is not known"))
            .ok()?;
        let user = list
            .into_iter()
            .find(|info| info.container_id == id)?
            .user?;
        let mut supplemental_groups = user.supplemental_groups;
        supplemental_groups.truncate(GROUP_LIMIT);
        Some(ContainerUser {
            uid: user.uid,
            gid: user.gid,
            supplemental_groups,
        })
    }

    /// Takes back whatever a failed create made, in the reverse order.
    async fn undo_create(&self, id: &str) {
        if let Ok(running) = self.running()
            && let Err(error) = running.shim.delete_task(id).await
        {
            tracing::warn!(
                id,
                error = report(&error),
                "task of a failed create is left in the guest"
            );
        }
        if let Err(error) = self.forget(id).await {
            tracing::warn!(id, error = report(&error), "row of a failed create is left");
        }
    }

    /// Lets a created container run; ok where it runs.
    ///
    /// # Errors
    /// `ContainerState` where it has ended; `Shim` where the guest cannot start it, after which it is Exited with
    /// StartError and 128.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let (this, id) = (self.clone(), id.to_owned());
        self.to_the_end(async move {
            let operation = this.operation(&id);
            let _alone = operation.lock().await;
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
            state @ ContainerState::Exited => return Err(wrong("a container runs once")(state)),
            state @ ContainerState::Unknown => return Err(wrong("it is not created yet")(state)),
        }
        let shim = self.running()?.shim;
        let asked = now_ns();
        let result = shim.start_task(id).await;
        if let Err(error) = result
            && !runs_after_all(&shim, id, &error).await
        {
            let message = report(&error);
            let exited = self.change(id, move |row| {
                let snapshot = &mut row.snapshot;
                // Its VM may have died meanwhile; then its end is written already.
                if snapshot.state == ContainerState::Created {
                    snapshot.state = ContainerState::Exited;
                    snapshot.exit_code = START_ERROR;
                    snapshot.reason = "StartError".to_owned();
                    snapshot.message = message;
                    snapshot.finished_at_ns = now_ns();
                }
            });
            if let Err(error) = exited.await {
                tracing::warn!(
                    id,
                    error = report(&error),
                    "failed start is not written down"
                );
            }
            return Err(error);
        }
        self.change(id, move |row| {
            let snapshot = &mut row.snapshot;
            if snapshot.state == ContainerState::Created {
                snapshot.state = ContainerState::Running;
            }
            // When it was asked for, not when the answer came: a short container has ended by then, perhaps even on record.
            snapshot.started_at_ns = asked;
            if snapshot.finished_at_ns > 0 {
                snapshot.finished_at_ns = snapshot.finished_at_ns.max(asked);
            }
        })
        .await
        .map(drop)
    }

    /// Sends `signal` (Linux number), gives `grace`, then SIGKILLs everything in the container; returns when it has
    /// ended. Ok where it does not run.
    ///
    /// A second call beside the first is independent: with less grace it kills sooner. Dropping the future leaves
    /// what was sent.
    ///
    /// # Errors
    /// `NotFound`, `Deadline` where it outlives SIGKILL.
    pub async fn stop_container(&self, id: &str, grace: Duration, signal: i32) -> Result<()> {
        if self.exact(id)?.state != ContainerState::Running {
            return Ok(());
        }
        if !grace.is_zero() {
            self.signal(id, signal, false).await;
            if tokio::time::timeout(grace, self.ended(id)).await.is_ok() {
                return Ok(());
            }
        }
        self.kill_and_wait(id).await
    }

    async fn kill_and_wait(&self, id: &str) -> Result<()> {
        self.signal(id, SIGKILL, true).await;
        tokio::time::timeout(KILL_LIMIT, self.ended(id))
            .await
            .map_err(|_| RuntimeError::Deadline {
                what: format!("the end of container {id} after SIGKILL"),
                limit: KILL_LIMIT,
            })
    }

    /// A signal that cannot be delivered is no failure by itself: the wait that follows tells whether the container
    /// ended.
    async fn signal(&self, id: &str, signal: i32, all: bool) {
        let result = match self.running() {
            Ok(running) => running.shim.kill_task(id, signal, all).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            tracing::debug!(
                id,
                signal,
                error = report(&error),
                "signal was not delivered"
            );
        }
    }

    /// Returns once the container does not run, or is gone.
    async fn ended(&self, id: &str) {
        let mut view = self.inner.view.clone();
        let running = |c: &ContainerSnapshot| c.state == ContainerState::Running;
        // An error means that the driver ended: the box is removed, or the runtime closes.
        let _ = view
            .wait_for(|view| !view.containers.get(id).is_some_and(running))
            .await;
    }

    /// Kills a container if it runs, and removes all of it but its log file; ok where it is gone.
    ///
    /// # Errors
    /// Whatever is left; it may be asked again.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let (this, id) = (self.clone(), id.to_owned());
        self.to_the_end(async move {
            let operation = this.operation(&id);
            let _alone = operation.lock().await;
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
        if let Ok(running) = self.running() {
            match running.shim.delete_task(id).await {
                // Its VM went with all its containers.
                Err(error) if self.running().is_err() => {
                    tracing::debug!(id, error = report(&error), "VM went first")
                }
                result => result?,
            }
        }
        self.forget(id).await
    }

    /// Removes the bundle, then the row; the driver lets go of the image.
    async fn forget(&self, id: &str) -> Result<()> {
        let bundle = self.inner.env.layout.container_bundle(self.id(), id);
        teardown::blocking(move || remove_tree(&bundle)).await?;
        match self
            .send(|reply| Message::Forget {
                id: id.to_owned(),
                reply,
            })
            .await
        {
            // The box went meanwhile, with all its rows.
            Err(RuntimeError::NotFound { .. }) => Ok(()),
            answer => answer?,
        }
    }

    /// New limits: OCI LinuxResources as JSON. `describe` then makes the caller's data anew, which is on disk before the
    /// answer. Updates of one container follow one another; dropping the future does not stop one.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState` where it has ended, `Shim`.
    pub async fn update_container(
        &self,
        id: &str,
        resources_json: Vec<u8>,
        describe: Describe,
    ) -> Result<()> {
        let (this, id) = (self.clone(), id.to_owned());
        self.to_the_end(async move {
            let operation = this.operation(&id);
            let _alone = operation.lock().await;
            this.update_locked(&id, resources_json).await?;
            let described = this.change(&id, move |row| {
                row.snapshot.metadata = describe(&row.snapshot.metadata);
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
                    reason: "limits of what does not live cannot be changed",
                });
            }
        }
        self.running()?.shim.update_task(id, resources_json).await
    }

    /// Has the shim close and reopen a container's log, after the kubelet moved it away.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState` unless it runs, `Shim`.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let state = self.exact(id)?.state;
        if state != ContainerState::Running {
            return Err(RuntimeError::ContainerState {
                id: id.to_owned(),
                state,
                reason: "only a running container's log can be reopened",
            });
        }
        self.running()?.shim.reopen_log(id).await
    }

    /// A container by full id.
    pub(super) fn exact(&self, id: &str) -> Result<ContainerSnapshot> {
        self.view()
            .containers
            .get(id)
            .cloned()
            .ok_or_else(|| RuntimeError::NotFound {
                what: "container",
                id: id.to_owned(),
            })
    }

    async fn change(
        &self,
        id: &str,
        change: impl FnOnce(&mut ContainerRow) + Send + 'static,
    ) -> Result<ContainerSnapshot> {
        let change: Change = Box::new(change);
        let id = id.to_owned();
        self.send(|reply| Message::Change { id, change, reply })
            .await?
    }

    /// A shim's event said that this container was killed for want of memory.
    pub(crate) async fn note_oom(&self, id: &str) {
        // A driver that has ended needs no note.
        let _ = self
            .inner
            .messages
            .send(Message::Oom { id: id.to_owned() })
            .await;
    }
}

/// Whether a start whose answer was lost happened nevertheless.
async fn runs_after_all(shim: &ShimController, id: &str, error: &RuntimeError) -> bool {
    let refused = matches!(error, RuntimeError::Shim { .. });
    !refused
        && matches!(
            shim.task_state(id).await,
            Ok(TaskState::Running | TaskState::Stopped(_))
        )
}

/// A row for a container that needs `images`, its root's first.
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

/// The caller's spec with what has no field in it as annotations, which the shim reads.
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

/// Makes the container's bundle; the spec holds environment variables, hence 0600.
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
        what: "cannot write",
        path: config.clone(),
        source,
    })
}

pub(super) fn image_error(image: &str, what: &'static str, source: ImageError) -> RuntimeError {
    let kind = match source.kind() {
        ImageErrorKind::NotFound => ErrorKind::NotFound,
        ImageErrorKind::InvalidReference => ErrorKind::InvalidArgument,
        ImageErrorKind::NoSpace | ImageErrorKind::TooLarge => ErrorKind::ResourceExhausted,
        ImageErrorKind::Unavailable => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    RuntimeError::Image {
        image: image.to_owned(),
        what,
        kind,
        source: Box::new(source),
    }
}
