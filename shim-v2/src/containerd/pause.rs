//! [`PauseTask`]: the pause container that represents the pod in containerd's CRI plugin, backed by the VM.
//!
//! It has no process in the guest, since the VM itself holds the pod's namespaces open. The task runs while the VM runs, a
//! signal to it stops the VM, and the end of the VM is its exit.
//!
//! ```text
//! Created ──start──► Running ──signal, VM died──► Stopped ──delete──► gone
//!    └──────────────────signal, VM died─────────────┘
//! ```

use crate::container::process::{Ended, Phase, ProcessConfig, State};
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

/// Exit status after a signal that a pause process handles.
const HANDLED_EXIT_STATUS: u32 = 0;
/// SIGINT and SIGTERM, on which a pause process exits with 0.
const HANDLED_SIGNALS: [u32; 2] = [2, 15];
/// Base of the exit status of a process that a signal killed.
const SIGNAL_EXIT_BASE: u32 = 128;

/// Handle to the pause container; clones share its state.
#[derive(Clone)]
pub struct PauseTask {
    sandbox: Sandbox,
    config: Arc<ProcessConfig>,
    state: watch::Sender<State>,
    /// 128 + the signal that stopped the VM; 0 without a signal or after one that a pause process handles.
    status: Arc<AtomicU32>,
}

impl PauseTask {
    /// Creates the task for a running VM and publishes TaskCreate. Spawns a task that waits for the end of the VM.
    pub fn create(sandbox: &Sandbox, request: &CreateTaskRequest) -> Self {
        let config = ProcessConfig {
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
            config: Arc::new(config),
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

    /// Returns the immutable properties.
    pub fn config(&self) -> &ProcessConfig {
        &self.config
    }

    /// Returns the last published state.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Marks the task running and returns the VM's pid.
    ///
    /// # Errors
    /// WrongState unless the phase is Created.
    pub fn start(&self) -> Result<u32> {
        let mut pid = 0;
        let started = self.state.send_if_modified(|state| {
            pid = state.pid;
            let created = state.phase == Phase::Created;
            if created {
                state.phase = Phase::Running;
            }
            created
        });
        if !started {
            return Err(self.wrong_state("start it"));
        }
        self.sandbox.context().publisher.publish(&TaskStart {
            container_id: self.config.container.clone(),
            pid,
            ..Default::default()
        });
        Ok(pid)
    }

    /// Stops the VM on any signal except 0, without waiting for it; see [`PauseTask::wait`].
    ///
    /// # Errors
    /// NotFound after the exit.
    pub fn kill(&self, signal: u32) -> Result<()> {
        if self.state.borrow().phase == Phase::Stopped {
            return Err(ShimError::NotFound {
                kind: "running process",
                id: self.config.container.clone(),
            });
        }
        if signal == 0 {
            return Ok(());
        }
        let status = match HANDLED_SIGNALS.contains(&signal) {
            true => HANDLED_EXIT_STATUS,
            false => SIGNAL_EXIT_BASE + signal.min(SIGNAL_EXIT_BASE - 1),
        };
        self.status.store(status, Ordering::Relaxed);
        let sandbox = self.sandbox.clone();
        self.sandbox.context().tasks.spawn(async move {
            if let Err(error) = sandbox.stop(Duration::ZERO).await {
                tracing::debug!(error = %Report(&error), "failed to stop the VM");
            }
        });
        Ok(())
    }

    /// Waits for the exit. Cancel safe.
    ///
    /// # Errors
    /// Ending while the shim is shutting down.
    pub async fn wait(&self) -> Result<Ended> {
        let mut state = self.state.subscribe();
        let state = state
            .wait_for(|state| state.ended.is_some())
            .await
            .map_err(|_| ShimError::Ending)?;
        state.ended.ok_or(ShimError::Ending)
    }

    /// Publishes TaskDelete and returns the final state. The caller removes the task.
    ///
    /// # Errors
    /// WrongState unless the phase is Stopped.
    pub fn delete(&self) -> Result<State> {
        let state = self.state();
        let Some(ended) = state.ended else {
            return Err(self.wrong_state("delete it"));
        };
        self.sandbox.context().publisher.publish(&TaskDelete {
            container_id: self.config.container.clone(),
            pid: state.pid,
            exit_status: ended.status,
            exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
            id: self.config.container.clone(),
            ..Default::default()
        });
        Ok(state)
    }

    /// Returns the error of an action that a pause container does not support.
    pub fn refuse(&self, action: &'static str) -> ShimError {
        self.wrong_state(action)
    }

    async fn follow(self) {
        let Ok(end) = self.sandbox.wait().await else {
            return;
        };
        // A stopped VM has status 0; after a signal the status is that of the signal.
        let status = match self.status.load(Ordering::Relaxed) {
            0 => end.status,
            status => status,
        };
        let ended = Ended {
            status,
            at_unix_ns: end.at_unix_ns,
        };
        self.sandbox.context().publisher.publish(&TaskExit {
            container_id: self.config.container.clone(),
            id: self.config.container.clone(),
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
            kind: "pause container",
            id: self.config.container.clone(),
            state: format!("{:?}", self.state.borrow().phase).to_lowercase(),
            action,
        }
    }
}
