//! The spawner process: receives requests, clones a helper for each, and does nothing else, so that it stays small and
//! has one thread.
//!
//! JUSTIFICATION of the unsafe code here: cloning with CLONE_PARENT has no safe form. Every clone in this crate is made
//! through [`clone_child`].

use super::wire::{self, Failure, FailureKind, Message, Request};
use super::{create, exec, pause};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Whose child a clone is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parent {
    /// The caller's.
    Caller,
    /// The caller's parent's: a sibling.
    Grand,
}

/// Clones the calling process, like fork(2). `None` in the child.
///
/// The caller must have one thread only. The child may use the whole of std: no lock can be held by another thread.
pub fn clone_child(parent: Parent) -> io::Result<Option<i32>> {
    let flags = match parent {
        Parent::Caller => libc::SIGCHLD,
        // With CLONE_PARENT the exit signal is the caller's own.
        Parent::Grand => libc::CLONE_PARENT,
    };
    // SAFETY: a clone without CLONE_VM and without a new stack behaves like fork; the caller is single-threaded (see
    // above), so the copied address space is consistent.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
    match pid {
        0 => Ok(None),
        pid if pid > 0 => Ok(Some(pid as i32)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Forks the spawner off the agent. Returns its pid and the agent's end of the socket; never returns in the spawner.
pub fn fork(agents_end: OwnedFd, spawners_end: OwnedFd) -> io::Result<(i32, OwnedFd)> {
    match clone_child(Parent::Caller)? {
        Some(pid) => Ok((pid, agents_end)),
        None => {
            // Without a copy of the agent's end the spawner sees when the agent is gone.
            drop(agents_end);
            run(&spawners_end)
        }
    }
}

/// Serves requests until the socket breaks.
fn run(socket: &OwnedFd) -> ! {
    let mut mark = [0];
    loop {
        match wire::receive_with(socket.as_fd(), &mut mark) {
            Ok((1, descriptors)) => match clone_child(Parent::Grand) {
                Ok(Some(_)) => drop(descriptors),
                Ok(None) => std::process::exit(help(descriptors)),
                Err(error) => refuse(&descriptors, &Failure::step("clone helper", error)),
            },
            Ok(_) => std::process::exit(0),
            Err(_) => std::process::exit(1),
        }
    }
}

/// Tells the asker when there isn't even a helper.
fn refuse(descriptors: &[OwnedFd], failure: &Failure) {
    if let Some(reply) = descriptors.get(1) {
        let _ = wire::send(reply.as_fd(), &Message::Failed(failure.clone()), None);
    }
}

/// The helper: plays the role asked for and answers its failure. Returns the exit code.
fn help(descriptors: Vec<OwnedFd>) -> i32 {
    let mut descriptors = descriptors.into_iter();
    let (Some(body), Some(reply)) = (descriptors.next(), descriptors.next()) else {
        return 1;
    };
    let rest: Vec<OwnedFd> = descriptors.collect();
    // The agent's own protection against the OOM killer is not inherited; roles set what the spec asks for.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    let result = match wire::from_memfd(body) {
        Ok(Request::Create(request)) => create::run(&request, rest, &reply),
        Ok(Request::Exec(request)) => exec::run(&request, rest, &reply),
        Ok(Request::Pause(map)) => pause::run(map, &reply),
        Err(error) => Err(Failure::new(
            FailureKind::Internal,
            format!("request: {error}"),
        )),
    };
    match result {
        Ok(()) => 0,
        Err(failure) => {
            let _ = wire::send(reply.as_fd(), &Message::Failed(failure), None);
            1
        }
    }
}
