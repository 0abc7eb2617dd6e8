//! Creates processes: [`Spawner`] in the agent asks a small single-threaded process, forked at boot, to fork again.
//!
//! Only a single-threaded process can enter namespaces and clone safely, and the agent has several threads. Before
//! tokio starts, the agent therefore forks the *spawner* ([`server`]), which receives requests with descriptors and
//! clones a *helper* for each. A helper has one role, [`create`] (libcontainer creates a container's init process),
//! [`exec`] (a further process in a container) or [`pause`] (the pod's shared PID namespace), replies on the
//! request's own socket, and exits. Everything is cloned with CLONE_PARENT, so all processes are children of the
//! agent and its reaper sees every exit. Compared with executing the agent's binary again, this saves loading and
//! relocating it for every exec.
//!
//! ```text
//! agent ──(kind, request memfd, reply socket, stdio …)──► spawner ──clone──► helper ──clone──► process
//!   ▲                                                                          │ Created{pid}    │ Console, Failed
//!   └──────────────── reply socket; closed by the process's exec ──────────────┴─────────────────┘
//! ```

mod clone;
mod confine;
mod create;
mod detail;
mod exec;
mod executable;
mod pause;
mod server;
mod user;
pub(crate) mod wire;

pub(crate) use exec::set_terminal_size;
pub(crate) use executable::errno_text;
pub(crate) use user::{ResolvedUser, UserError, resolve as resolve_user};

use crate::descriptor::AsyncDescriptor;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use wire::{Message, Request};

/// Timeout of a helper creating a process. Generous, because a TCG guest under load has to page in the code.
const HELPER_TIMEOUT: Duration = Duration::from_secs(60);

/// Reasons a process could not be created.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// Reported by the helper or by the process itself.
    #[error("{}", .0.message)]
    Refused(wire::Failure),
    /// The spawner or its socket failed.
    #[error("spawner: failed to {step}")]
    Broken {
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// The helper exited without a reply.
    #[error("spawner helper exited without a reply")]
    Silent,
    /// The helper did not reply in time.
    #[error("spawner helper did not reply within {HELPER_TIMEOUT:?}")]
    Timeout,
}

/// The agent's end of the spawner.
#[derive(Debug)]
pub(crate) struct Spawner {
    socket: OwnedFd,
    /// PID of the spawner.
    pub pid: i32,
}

impl Spawner {
    /// Forks the spawner. The caller must be single-threaded and PID 1.
    ///
    /// # Errors
    /// If the socket pair or the fork fails.
    pub(crate) fn start() -> Result<Self, SpawnError> {
        let (ours, theirs) = pair()?;
        let (pid, socket) = server::fork(ours, theirs).map_err(|source| SpawnError::Broken {
            step: "fork",
            source,
        })?;
        Ok(Self { socket, pid })
    }

    /// Requests a process; messages about it arrive on the returned [`Reply`].
    pub(crate) fn request(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Reply, SpawnError> {
        let broken = |step| move |source: io::Error| SpawnError::Broken { step, source };
        let body = wire::to_memfd(request).map_err(broken("write the request"))?;
        let (ours, theirs) = pair()?;
        let mut passed = vec![body.as_fd(), theirs.as_fd()];
        passed.extend_from_slice(descriptors);
        wire::send_with(
            self.socket.as_fd(),
            &[wire::REQUEST_MARK],
            &passed,
            SendFlags::NOSIGNAL,
        )
        .map_err(broken("send the request"))?;
        let socket = AsyncDescriptor::new(ours).map_err(broken("register the reply socket"))?;
        Ok(Reply { socket })
    }
}

/// The agent's end of one request.
#[derive(Debug)]
pub(crate) struct Reply {
    socket: AsyncDescriptor,
}

impl Reply {
    /// Returns the next message with its descriptor, or `None` once helper and process have closed their ends, which
    /// an exec does. Cancel-safe.
    pub(crate) async fn next(&self) -> Result<Option<(Message, Option<OwnedFd>)>, SpawnError> {
        let received = self.socket.read_with(wire::receive);
        match tokio::time::timeout(HELPER_TIMEOUT, received).await {
            Ok(result) => result.map_err(|source| SpawnError::Broken {
                step: "receive the reply",
                source,
            }),
            Err(_) => Err(SpawnError::Timeout),
        }
    }

    /// Releases the process, which waits until its PID is registered.
    pub(crate) fn release(&self) -> Result<(), SpawnError> {
        wire::send_with(
            self.socket.get(),
            &[wire::REQUEST_MARK],
            &[],
            SendFlags::NOSIGNAL,
        )
        .map_err(|source| SpawnError::Broken {
            step: "release the process",
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
