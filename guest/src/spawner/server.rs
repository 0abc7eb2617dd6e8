//! The spawner process: receives requests and clones a helper for each. It does nothing else, to remain small and
//! single-threaded.

use super::clone::{Parent, clone_child};
use super::wire::{self, Failure, FailureKind, Message, Request};
use super::{create, exec, pause};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// Forks the spawner off the agent. Returns its PID and the agent's end of the socket; never returns in the spawner.
pub(crate) fn fork(agents_end: OwnedFd, spawners_end: OwnedFd) -> io::Result<(i32, OwnedFd)> {
    match clone_child(Parent::Caller)? {
        Some(pid) => Ok((pid, agents_end)),
        None => {
            // Without a copy of the agent's end, the spawner notices when the agent is gone.
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
                Ok(None) => std::process::exit(run_helper(descriptors)),
                Err(error) => report_failure(&descriptors, &Failure::step("clone a helper", error)),
            },
            Ok(_) => std::process::exit(0),
            Err(_) => std::process::exit(1),
        }
    }
}

/// Reports a failure when no helper could be cloned.
fn report_failure(descriptors: &[OwnedFd], failure: &Failure) {
    if let Some(reply) = descriptors.get(1) {
        let _ = wire::send(reply.as_fd(), &Message::Failed(failure.clone()), None);
    }
}

/// Runs in the helper: performs its role and reports a failure. Returns the exit code.
fn run_helper(descriptors: Vec<OwnedFd>) -> i32 {
    let mut descriptors = descriptors.into_iter();
    let (Some(body), Some(reply)) = (descriptors.next(), descriptors.next()) else {
        return 1;
    };
    let rest: Vec<OwnedFd> = descriptors.collect();
    // The agent's protection against the OOM killer must not be inherited; roles set the value of the spec.
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
