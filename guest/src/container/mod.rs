//! Containers of the pod.
//!
//! [`pod::Pod`] finds containers by id and serializes their creation and removal; [`Container`] is one of them;
//! [`create`] and [`exec`] create processes through the spawner; [`spec`] adapts the OCI spec; [`events`] logs
//! events.
//!
//! ```text
//!            Init                Start               init process ends
//!  (absent) ──────► Created ──────────────► Running ───────────────────► Stopped ──Delete──► (absent)
//!                      └───────── killed, or its program cannot run ────────▲
//! ```
//! Running containers can be paused. State is kept in memory only; the host's copy survives the VM.

mod context;
mod create;
mod devices;
pub(crate) mod error;
mod events;
pub(crate) mod exec;
mod execs;
pub(crate) mod launcher;
mod oom;
pub(crate) mod pod;
mod spec;
mod teardown;
mod userns;

use crate::cgroup::Cgroup;
use crate::execution::Process;
use crate::spawner::wire::ProcessPlan;
use crate::spawner::{Reply, SpawnError};
use crate::steps::Steps;
use crate::storage::rootfs::Rootfs;
use crate::storage::usage::UsageCache;
use boxlite_proto::boxlite::v1::{
    ContainerInfo, ContainerState, ContainerUser, OomEvent, container_event::Event,
};
use boxlite_sys::report::report;
use context::PodContext;
use error::ContainerError;
use execs::Execs;
use launcher::until_exec;
use rustix::process::{Pid, Signal, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use teardown::remove_state;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use userns::UserNamespace;

/// Timeout between the start signal and the program's exec; all slow steps were done before.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A container whose init process exists or has existed.
#[derive(Debug)]
pub(crate) struct Container {
    pub id: String,
    /// The init process with its streams.
    pub init: Arc<Process>,
    pub cgroup: Cgroup,
    /// The mount namespace, kept open until the share has been synchronized: see [`crate::storage::sync_share`].
    mounts: boxlite_sys::sync::Mutex<Option<std::fs::File>>,
    /// Refers to the init process even if its PID is reused.
    pidfd: OwnedFd,
    rootfs: Rootfs,
    /// The user namespace, if it is not the VM's.
    user_namespace: Option<UserNamespace>,
    /// Times of its creation.
    pub creation: Steps,
    /// Defaults of an exec.
    base: ProcessPlan,
    /// Directory of libcontainer's state.
    state: PathBuf,
    /// Socket on which the init process reports a failed exec; taken by Start.
    reply: tokio::sync::Mutex<Option<Reply>>,
    started: AtomicBool,
    paused: AtomicBool,
    execs: Execs,
    usage: UsageCache,
    /// OOM kills already reported as events.
    oom_reported: AtomicU64,
    /// Watcher of the mounts below Bidirectional volumes.
    watch: Option<Arc<crate::mount_export::watcher::MountWatcher>>,
}

impl Container {
    /// Returns the state as defined by the protocol.
    pub(crate) fn state(&self) -> ContainerState {
        if self.init.exit().is_some() {
            ContainerState::Stopped
        } else if !self.started.load(Ordering::Acquire) {
            ContainerState::Created
        } else if self.paused.load(Ordering::Acquire) {
            ContainerState::Paused
        } else {
            ContainerState::Running
        }
    }

    /// Returns the entry of a container list.
    pub(crate) fn info(&self) -> ContainerInfo {
        ContainerInfo {
            container_id: self.id.clone(),
            state: self.state().into(),
            pid: self.init.pid.unsigned_abs(),
            exit: self.init.exit(),
            user: Some(ContainerUser {
                uid: self.base.user.uid,
                gid: self.base.user.gid,
                supplemental_groups: self.base.user.additional_gids.clone(),
            }),
        }
    }

    /// Lets the init process execute its program. A second call is a no-op.
    ///
    /// # Errors
    /// If the program cannot be executed (the container is then stopped), or the container has ended.
    ///
    /// If the future is dropped after the signal was sent, the container is started.
    pub(crate) async fn start(&self) -> Result<(), ContainerError> {
        let mut reply = self.reply.lock().await;
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.init.exit().is_some() {
            return Err(self.wrong_state("start"));
        }
        let Some(reply) = reply.take() else {
            return Err(self.wrong_state("start"));
        };
        let socket = self.state.join(libcontainer::notify_socket::NOTIFY_FILE);
        let signal = async {
            let mut stream = UnixStream::connect(socket).await?;
            stream.write_all(b"start container").await?;
            stream.shutdown().await
        };
        signal
            .await
            .map_err(ContainerError::step("failed to send the start signal"))?;
        self.started.store(true, Ordering::Release);
        match tokio::time::timeout(START_TIMEOUT, until_exec(&reply)).await {
            Ok(result) => Ok(result.map(drop)?),
            Err(_) => Err(SpawnError::Timeout.into()),
        }
    }

    /// Signals the init process, or all processes if `all` is set. Succeeds on a container that has ended.
    pub(crate) fn kill(&self, signal: u32, all: bool) -> Result<(), ContainerError> {
        if self.init.exit().is_some() && !all {
            return Ok(());
        }
        let signal = signal_of(signal)?;
        if all {
            return kill_all(&self.cgroup, signal);
        }
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(ContainerError::Step {
                step: "failed to signal the init process",
                source: errno.into(),
            }),
        }
    }

    /// Freezes or thaws all processes.
    pub(crate) fn pause(&self, paused: bool) -> Result<(), ContainerError> {
        match self.state() {
            ContainerState::Running | ContainerState::Paused => {}
            _ => return Err(self.wrong_state(if paused { "pause" } else { "resume" })),
        }
        self.cgroup.freeze(paused)?;
        self.paused.store(paused, Ordering::Release);
        Ok(())
    }

    /// Returns the process with that exec id, or the init process if it is empty.
    pub(crate) async fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() {
            Ok(Arc::clone(&self.init))
        } else {
            self.execs.get(exec_id).await
        }
    }

    /// Returns the bytes and inodes used by the writable layer. Blocks.
    pub(crate) fn upper_usage(&self) -> crate::storage::usage::Usage {
        self.rootfs
            .upper()
            .map(|upper| self.usage.get(&upper))
            .unwrap_or_default()
    }

    /// Emits an event if `kills` exceeds the number of OOM kills reported so far.
    pub(crate) fn emit_oom(&self, context: &PodContext, kills: u64) {
        if self.oom_reported.fetch_max(kills, Ordering::AcqRel) < kills {
            context
                .events
                .add(&self.id, "", Event::Oom(OomEvent { count: kills }));
        }
    }

    /// Kills the container's processes and removes its state. Blocks.
    pub(crate) fn tear_down(&self, context: &PodContext) {
        // The order matters: processes, their requests to the share, then the mounts they used.
        if let Err(error) = self.cgroup.remove() {
            tracing::warn!(error = report(&error), "failed to remove cgroup");
        }
        crate::storage::sync_share();
        drop(self.mounts.lock().take());
        remove_state(&context.layers, &self.cgroup, &self.rootfs, &self.state);
    }

    fn wrong_state(&self, action: &'static str) -> ContainerError {
        let state = match self.state() {
            ContainerState::Created => "created",
            ContainerState::Running => "running",
            ContainerState::Paused => "paused",
            ContainerState::Stopped => "stopped",
            ContainerState::Unspecified => "unknown",
        };
        ContainerError::WrongState {
            id: self.id.clone(),
            state,
            action,
        }
    }
}

/// Converts a Linux signal number.
pub(crate) fn signal_of(number: u32) -> Result<Signal, ContainerError> {
    let invalid = || ContainerError::Invalid {
        field: "signal",
        reason: format!("{number} is not a signal number"),
    };
    let number = i32::try_from(number).map_err(|_| invalid())?;
    // Real-time signals have no names, and those reserved by the C library are valid to send.
    if !(1..=64).contains(&number) {
        return Err(invalid());
    }
    // SAFETY: the kernel accepts any number in 1..=64; no handler is installed for it here.
    Ok(unsafe { Signal::from_raw_unchecked(number) })
}

/// Signals all processes of a cgroup.
pub(crate) fn kill_all(cgroup: &Cgroup, signal: Signal) -> Result<(), ContainerError> {
    if signal == Signal::KILL {
        return Ok(cgroup.kill()?);
    }
    for pid in cgroup.processes().into_iter().filter_map(Pid::from_raw) {
        // The process may have ended in the meantime.
        let _ = rustix::process::kill_process(pid, signal);
    }
    Ok(())
}
