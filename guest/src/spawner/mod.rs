//! Makes processes: [`Spawner`] in the agent asks a small single-threaded process, forked at boot, to fork again.
//!
//! Namespaces must be entered and processes cloned by a process with one thread; the agent has several. So before tokio
//! starts, the agent forks the *spawner* ([`server`]), which does nothing but receive a request with descriptors and clone
//! a *helper* for it. A helper plays one role, [`create`] (libcontainer makes a container's init process), [`exec`] (a
//! further process in a container) or [`pause`] (the pod's shared PID namespace), answers on the request's own socket,
//! and ends. Everything is cloned with CLONE_PARENT, so that all processes are children of the agent and its reaper sees
//! every exit. Compared with executing the agent's binary again this saves loading and relocating it for every exec.
//!
//! ```text
//! agent ──(kind, request memfd, reply socket, stdio …)──► spawner ──clone──► helper ──clone──► process
//!   ▲                                                                          │ Created{pid}    │ Console, Failed
//!   └──────────────── reply socket; closed by the process's exec ──────────────┴─────────────────┘
//! ```

mod confine;
mod create;
mod detail;
mod exec;
mod executable;
mod pause;
mod server;
mod user;
pub mod wire;

pub use exec::set_terminal_size;
pub use user::{ResolvedUser, UserError, resolve as resolve_user};

use crate::descriptor::AsyncDescriptor;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use wire::{Message, Request};

/// Longest time a helper may take to make a process: generous, since a TCG guest under load pages its way through it.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a process could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The helper or the process itself reported it.
    #[error("{}", .0.message)]
    Refused(wire::Failure),
    /// The spawner or its socket broke.
    #[error("spawner: {step}")]
    Broken {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The helper ended without an answer.
    #[error("the helper ended without an answer")]
    Silent,
    /// The helper took too long.
    #[error("no answer from the helper within {HELPER_TIMEOUT:?}")]
    Timeout,
}

/// The agent's end of the spawner.
#[derive(Debug)]
pub struct Spawner {
    socket: OwnedFd,
    /// The spawner's process.
    pub pid: i32,
}

impl Spawner {
    /// Forks the spawner. The caller must have one thread only, and be PID 1.
    ///
    /// # Errors
    /// Socket or fork failed.
    pub fn start() -> Result<Self, SpawnError> {
        let (ours, theirs) = pair()?;
        let (pid, socket) = server::fork(ours, theirs).map_err(|source| SpawnError::Broken {
            step: "fork",
            source,
        })?;
        Ok(Self { socket, pid })
    }

    /// Asks for a process; the answers come on the returned [`Reply`].
    pub fn request(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Reply, SpawnError> {
        let broken = |step| move |source: io::Error| SpawnError::Broken { step, source };
        let body = wire::to_memfd(request).map_err(broken("write request"))?;
        let (ours, theirs) = pair()?;
        let mut passed = vec![body.as_fd(), theirs.as_fd()];
        passed.extend_from_slice(descriptors);
        wire::send_with(
            self.socket.as_fd(),
            &[wire::REQUEST_MARK],
            &passed,
            SendFlags::NOSIGNAL,
        )
        .map_err(broken("send request"))?;
        let socket = AsyncDescriptor::new(ours).map_err(broken("reply socket"))?;
        Ok(Reply { socket })
    }
}

/// The agent's end of one request.
#[derive(Debug)]
pub struct Reply {
    socket: AsyncDescriptor,
}

impl Reply {
    /// The next message with the descriptor it carries; `None` once helper and process have closed their end, which an
    /// exec does. Dropping the future loses nothing.
    pub async fn next(&self) -> Result<Option<(Message, Option<OwnedFd>)>, SpawnError> {
        let received = self.socket.read_with(wire::receive);
        match tokio::time::timeout(HELPER_TIMEOUT, received).await {
            Ok(result) => result.map_err(|source| SpawnError::Broken {
                step: "receive reply",
                source,
            }),
            Err(_) => Err(SpawnError::Timeout),
        }
    }

    /// Lets the process go on that waits to be registered.
    pub fn release(&self) -> Result<(), SpawnError> {
        wire::send_with(
            self.socket.get(),
            &[wire::REQUEST_MARK],
            &[],
            SendFlags::NOSIGNAL,
        )
        .map_err(|source| SpawnError::Broken {
            step: "release process",
            source,
        })
    }
}

fn pair() -> Result<(OwnedFd, OwnedFd), SpawnError> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|errno| SpawnError::Broken {
        step: "socketpair",
        source: errno.into(),
    })
}
