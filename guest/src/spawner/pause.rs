//! Role *pause*: holds the pod's shared PID namespace. Its process is PID 1 there, so containers that share the
//! namespace see it and not the agent.

use super::server::{Parent, clone_child};
use super::wire::{self, Failure, Message};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, Signal, signal};
use std::os::fd::{AsFd, OwnedFd};

/// Makes the namespace and its first process.
pub fn run(reply: &OwnedFd) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(|errno| Failure::step("unshare PID namespace", errno))?;
    match clone_child(Parent::Grand) {
        Ok(Some(pid)) => wire::send(reply.as_fd(), &Message::Created { pid }, None)
            .map_err(|error| Failure::step("reply", error)),
        Ok(None) => hold(),
        Err(error) => Err(Failure::step("clone", error)),
    }
}

/// Waits for ever. The kernel reaps orphans of the namespace by itself when SIGCHLD is ignored.
fn hold() -> ! {
    // SAFETY: SIG_IGN installs no handler code.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    let _ = std::fs::write("/proc/self/comm", "pause");
    // Without it every shared-namespace container would die with this process.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-998");
    close_all();
    loop {
        nix::unistd::pause();
    }
}

/// Closes everything inherited: stdio is the console's, the reply socket's end must be seen by the agent.
fn close_all() {
    for descriptor in 0..64 {
        // SAFETY: this process owns all its descriptors and uses none of them again.
        let _ = unsafe { libc::close(descriptor) };
    }
}
