//! [`PauseTask`]: the task that containerd's CRI plugin takes for the pod: its pause container. The VM itself is it.
//!
//! No process runs for it in the guest: a pause holds namespaces open, and a VM holds its own. It runs while the VM
//! does, a signal to it ends the VM, and the VM's end is its exit. Containers are [`crate::container`]'s.
//!
//! ```text
//! Created ──start──► Running ──signal, VM died──► Stopped ──delete──► gone
//!    └──────────────────signal, VM died─────────────┘
//! ```

use crate::container::process::{About, Ended, Phase, State};
use crate::error::{Result, ShimError};
use crate::logs::Stdio;
use crate::sandbox::Sandbox;
use crate::time;
use boxlite_sys::report::Report;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExit, TaskStart};
use containerd_shim_protos::protobuf::MessageField;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// Status after the signals that a pause process handles.
const ORDERLY: u32 = 0;
/// SIGINT and SIGTERM: a pause process ends with 0.
const HANDLED: [u32; 2] = [2, 15];
/// What a death by signal adds to its number.
const SIGNALLED: u32 = 128;

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct PauseTask {
    sandbox: Sandbox,
    about: Arc<About>,
    state: watch::Sender<State>,
    /// 128 + the signal that ended the VM; 0: none, or one that a pause process handles.
    status: Arc<AtomicU32>,
}

impl PauseTask {
    /// The task over a VM that runs; announces its creation. A task of the sandbox's tracker follows the VM's end.
    pub fn create(sandbox: &Sandbox, request: &CreateTaskRequest) -> Self {
        let about = About {
            container: request.id.clone(),
            exec: String::new(),
            bundle: PathBuf::from(&request.bundle),
            stdio: Stdio {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                guest_input: false,
            },
        };
        let pid = sandbox.snapshot().pid;
        let task = Self {
            sandbox: sandbox.clone(),
            about: Arc::new(about),
            state: watch::Sender::new(State {
                phase: Phase::Created,
                pid,
                ended: None,
            }),
            status: Arc::default(),
        };
        sandbox.context().publisher.publish(&TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            pid,
            ..Default::default()
        });
        sandbox.context().tasks.spawn(task.clone().follow());
        task
    }

    /// What does not change.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The state as last published.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Says that it runs; answers the VM's pid.
    ///
    /// # Errors
    /// WrongState unless it is Created.
    pub fn start(&self) -> Result<u32> {
        let mut pid = 0;
        let started = self.state.send_if_modified(|state| {
            pid = state.pid;
            let fits = state.phase == Phase::Created;
            if fits {
                state.phase = Phase::Running;
            }
            fits
        });
        if !started {
            return Err(self.wrong_state("start it"));
        }
        self.sandbox.context().publisher.publish(&TaskStart {
            container_id: self.about.container.clone(),
            pid,
            ..Default::default()
        });
        Ok(pid)
    }

    /// Ends the VM, whatever the signal but 0. Returns at once; [`PauseTask::wait`] tells the end.
    ///
    /// # Errors
    /// NotFound once it has ended.
    pub fn kill(&self, signal: u32) -> Result<()> {
        if self.state.borrow().phase == Phase::Stopped {
            return Err(ShimError::NotFound {
                what: "running process",
                id: self.about.container.clone(),
            });
        }
        if signal == 0 {
            return Ok(());
        }
        let status = match HANDLED.contains(&signal) {
            true => ORDERLY,
            false => SIGNALLED + signal.min(SIGNALLED - 1),
        };
        self.status.store(status, Ordering::Relaxed);
        let sandbox = self.sandbox.clone();
        self.sandbox.context().tasks.spawn(async move {
            if let Err(error) = sandbox.stop(Duration::ZERO).await {
                tracing::debug!(error = %Report(&error), "the VM is not stopped");
            }
        });
        Ok(())
    }

    /// Waits for its end. Many may wait; dropping the future changes nothing.
    ///
    /// # Errors
    /// Only when the shim is ending.
    pub async fn wait(&self) -> Result<Ended> {
        let mut state = self.state.subscribe();
        let state = state
            .wait_for(|state| state.ended.is_some())
            .await
            .map_err(|_| ShimError::Ending)?;
        state.ended.ok_or(ShimError::Ending)
    }

    /// Announces that it is gone; the caller forgets it.
    ///
    /// # Errors
    /// WrongState while it is not Stopped.
    pub fn delete(&self) -> Result<State> {
        let state = self.state();
        let Some(ended) = state.ended else {
            return Err(self.wrong_state("delete it"));
        };
        self.sandbox.context().publisher.publish(&TaskDelete {
            container_id: self.about.container.clone(),
            pid: state.pid,
            exit_status: ended.status,
            exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
            id: self.about.container.clone(),
            ..Default::default()
        });
        Ok(state)
    }

    /// What a pause container cannot do.
    pub fn refuse(&self, action: &'static str) -> ShimError {
        self.wrong_state(action)
    }

    async fn follow(self) {
        let Ok(end) = self.sandbox.wait().await else {
            return;
        };
        // A VM that was stopped tells 0; who asked by a signal hears of the signal.
        let status = match self.status.load(Ordering::Relaxed) {
            0 => end.status,
            status => status,
        };
        let ended = Ended {
            status,
            at_unix_ns: end.at_unix_ns,
        };
        self.sandbox.context().publisher.publish(&TaskExit {
            container_id: self.about.container.clone(),
            id: self.about.container.clone(),
            pid: self.state.borrow().pid,
            exit_status: status,
            exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
            ..Default::default()
        });
        self.state.send_modify(|state| {
            state.phase = Phase::Stopped;
            state.ended = Some(ended);
        });
    }

    fn wrong_state(&self, action: &'static str) -> ShimError {
        ShimError::WrongState {
            what: "pause container",
            id: self.about.container.clone(),
            state: format!("{:?}", self.state.borrow().phase).to_lowercase(),
            action,
        }
    }
}
