//! [`Launcher`]: the services every new process of a container needs, shared by [`super::create`] and [`super::exec`].

use super::error::ContainerError;
use crate::boot::reaper::{RawExit, Reaper};
use crate::spawner::wire::{Failure, FailureKind, Message};
use crate::spawner::{Reply, SpawnError, Spawner};
use std::io;
use std::os::fd::OwnedFd;
use tokio_util::task::TaskTracker;

/// Spawner, reaper and task tracker of the VM.
#[derive(Debug)]
pub(crate) struct Launcher {
    /// Creates processes.
    pub spawner: Spawner,
    /// Collects the exit of every process in the VM.
    pub reaper: Reaper,
    /// Owns the tasks that outlive an RPC: those that create containers and follow processes.
    pub tasks: TaskTracker,
}

/// PID of a new process, its registered exit, and the master of its terminal.
pub(crate) type Received = (
    i32,
    tokio::sync::oneshot::Receiver<RawExit>,
    Option<OwnedFd>,
);

impl Launcher {
    /// Creates the launcher of a VM without processes.
    pub(crate) fn new(spawner: Spawner) -> Self {
        Self {
            spawner,
            reaper: Reaper::default(),
            tasks: TaskTracker::new(),
        }
    }

    /// Reads the helper's messages until the process exists, and registers the process with the reaper.
    pub(crate) async fn receive(&self, reply: &Reply) -> Result<Received, ContainerError> {
        let mut console = None;
        let mut detail = None;
        loop {
            match reply.next().await? {
                Some((Message::Created { pid }, _)) => {
                    return Ok((pid, self.reaper.register(pid), console));
                }
                Some((Message::Console, master)) => console = master,
                // The first message is the innermost: the system call that failed.
                Some((Message::Detail(text), _)) => detail = detail.or(Some(text)),
                Some((Message::Failed(mut failure), _)) => {
                    if let Some(detail) = detail.filter(|_| failure.kind == FailureKind::Internal) {
                        failure.message = format!("{}: {detail}", failure.message);
                    }
                    return Err(SpawnError::Refused(failure).into());
                }
                None => return Err(SpawnError::Silent.into()),
            }
        }
    }
}

/// Waits until the process has executed its program, which closes its end of the socket. Returns the terminal's
/// master if it was sent.
pub(crate) async fn until_exec(reply: &Reply) -> Result<Option<OwnedFd>, SpawnError> {
    let mut console = None;
    loop {
        match reply.next().await? {
            None => return Ok(console),
            Some((Message::Console, master)) => console = master,
            Some((Message::Detail(_), _)) => {}
            Some((Message::Failed(failure), _)) => return Err(SpawnError::Refused(failure)),
            Some((Message::Created { .. }, _)) => {
                let failure = Failure::new(FailureKind::Internal, "the process was created twice");
                return Err(SpawnError::Refused(failure));
            }
        }
    }
}

/// Runs a blocking function in the thread pool.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ContainerError> + Send + 'static,
) -> Result<T, ContainerError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ContainerError::Step {
            step: "blocking task panicked",
            source: io::Error::other(error),
        }),
    }
}
