//! Containers of the pod.
//!
//! [`pod::Pod`] finds them by id and makes creation and removal happen once; [`Container`] is one of them; [`create`] and
//! [`exec`] make its processes through the spawner; [`spec`] adapts the OCI spec; [`events`] tells what happened.
//!
//! ```text
//!            Init                Start               init process ends
//!  (absent) ──────► Created ──────────────► Running ───────────────────► Stopped ──Delete──► (absent)
//!                      └───────── killed, or its program can't run ─────────▲
//! ```
//! Running containers can be paused. State lives in memory only: the host's copy survives the VM, nothing here does.

pub mod create;
mod devices;
pub mod events;
pub mod exec;
pub mod oom;
pub mod pod;
pub mod spec;
mod userns;

use crate::cgroup::{Cgroup, CgroupError};
use crate::execution::Process;
use crate::spawner::wire::ProcessPlan;
use crate::spawner::{Reply, SpawnError, UserError};
use crate::storage::StorageError;
use crate::storage::rootfs::Rootfs;
use crate::storage::usage::UsageCache;
use crate::system::SystemError;
use boxlite_proto::boxlite::v1::{ContainerInfo, ContainerState, ContainerUser};
use rustix::process::{Pid, Signal, pidfd_send_signal};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use userns::UserNamespace;

/// Longest time between the start signal and the program's exec; everything slow was done before.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Why something could not be done to a container.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// No such container or exec.
    #[error("{what} {id:?} not found")]
    NotFound { what: &'static str, id: String },
    /// It is not in a state for that.
    #[error("container {id} is {state}: cannot {action}")]
    WrongState {
        id: String,
        state: &'static str,
        action: &'static str,
    },
    /// A field of the request is not what it should be.
    #[error("{field}: {reason}")]
    Invalid { field: &'static str, reason: String },
    /// A bound of the agent.
    #[error("{what}: at most {limit}")]
    Limit { what: &'static str, limit: usize },
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    System(#[from] SystemError),
    /// A system call outside of the above.
    #[error("{step}")]
    Step {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The pod isn't there yet.
    #[error("the guest is not initialized")]
    NoPod,
    /// Work that was shared with an earlier call failed there.
    #[error(transparent)]
    Shared(#[from] Arc<ContainerError>),
}

impl ContainerError {
    fn step(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Step { step, source }
    }
}

/// A container whose init process exists or existed.
#[derive(Debug)]
pub struct Container {
    pub id: String,
    /// The init process, and everything about its streams.
    pub init: Arc<Process>,
    pub cgroup: Cgroup,
    /// Its mount namespace, which so outlives its processes: see [`crate::storage::settle_share`].
    mounts: boxlite_sys::sync::Mutex<Option<std::fs::File>>,
    /// Stands for the init process, whatever becomes of its number.
    pidfd: OwnedFd,
    rootfs: Rootfs,
    /// Its user namespace, if not the VM's.
    user_namespace: Option<UserNamespace>,
    /// Defaults of an exec.
    base: ProcessPlan,
    /// libcontainer's directory of it.
    state: PathBuf,
    /// The init process's own word about its exec; taken by the start.
    reply: tokio::sync::Mutex<Option<Reply>>,
    started: AtomicBool,
    paused: AtomicBool,
    execs: exec::Execs,
    usage: UsageCache,
    /// OOM kills already told as an event.
    oom_told: AtomicU64,
    /// Where it has Bidirectional volumes: its mounts.
    watch: Option<Arc<crate::shown::watch::Watch>>,
}

impl Container {
    /// Its state in the wire's words.
    pub fn state(&self) -> ContainerState {
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

    /// What a list shows.
    pub fn info(&self) -> ContainerInfo {
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
    /// The program can't be executed (the container is then stopped), or the container has ended before.
    ///
    /// Dropping the future after the signal was sent leaves the container started.
    pub async fn start(&self) -> Result<(), ContainerError> {
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
        signal.await.map_err(ContainerError::step("start signal"))?;
        self.started.store(true, Ordering::Release);
        match tokio::time::timeout(START_TIMEOUT, create::until_exec(&reply)).await {
            Ok(result) => Ok(result.map(drop)?),
            Err(_) => Err(SpawnError::Timeout.into()),
        }
    }

    /// Signals the init process, or with `all` every process. Succeeds on a container that has ended.
    pub fn kill(&self, signal: u32, all: bool) -> Result<(), ContainerError> {
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
                step: "signal init process",
                source: errno.into(),
            }),
        }
    }

    /// Freezes or thaws all processes.
    pub fn pause(&self, paused: bool) -> Result<(), ContainerError> {
        match self.state() {
            ContainerState::Running | ContainerState::Paused => {}
            _ => return Err(self.wrong_state(if paused { "pause" } else { "resume" })),
        }
        self.cgroup.freeze(paused)?;
        self.paused.store(paused, Ordering::Release);
        Ok(())
    }

    /// The process with that exec id; the init process where it is empty.
    pub async fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() {
            Ok(Arc::clone(&self.init))
        } else {
            self.execs.get(exec_id).await
        }
    }

    /// Bytes and inodes of the writable layer. Blocks.
    pub fn upper_usage(&self) -> crate::storage::usage::Usage {
        self.rootfs
            .upper()
            .map(|upper| self.usage.get(&upper))
            .unwrap_or_default()
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

/// A signal by its Linux number.
pub fn signal_of(number: u32) -> Result<Signal, ContainerError> {
    let invalid = || ContainerError::Invalid {
        field: "signal",
        reason: format!("{number} is no signal"),
    };
    let number = i32::try_from(number).map_err(|_| invalid())?;
    // Real-time signals have no names, and those the C library keeps for itself are valid to send.
    if !(1..=64).contains(&number) {
        return Err(invalid());
    }
    // SAFETY: the kernel takes any number in 1..=64; nothing here installs a handler for it.
    Ok(unsafe { Signal::from_raw_unchecked(number) })
}

/// Signals everything in a cgroup.
pub fn kill_all(cgroup: &Cgroup, signal: Signal) -> Result<(), ContainerError> {
    if signal == Signal::KILL {
        return Ok(cgroup.kill()?);
    }
    for pid in cgroup.processes().into_iter().filter_map(Pid::from_raw) {
        // One that has ended meanwhile needs no signal.
        let _ = rustix::process::kill_process(pid, signal);
    }
    Ok(())
}
