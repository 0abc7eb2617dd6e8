//! Role *pause*: holds the pod's shared PID namespace, and its user namespace where it has one. Its process is PID 1 there,
//! so containers that share the namespace see it and not the agent.
//!
//! ```text
//! helper ──clone──► holder: new user namespace ─► waits for its maps ─► root in it ─► new PID namespace ──clone──► pause
//!    └──────────────────── writes uid_map, gid_map ───────┘
//! ```
//! Without a user namespace the helper is the holder.

use super::server::{Parent, clone_child};
use super::wire::{self, Failure, FailureKind, IdMap, Message};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

/// Nearly never chosen when memory runs out: every container of the namespaces would die with it.
const OOM_SCORE: &str = "-998";

/// Makes the namespaces and the process that holds them.
pub fn run(map: Option<IdMap>, reply: &OwnedFd) -> Result<(), Failure> {
    match map {
        None => hold_in_new_pid_namespace(reply),
        Some(map) => with_user_namespace(map, reply),
    }
}

fn hold_in_new_pid_namespace(reply: &OwnedFd) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(|errno| Failure::step("unshare PID namespace", errno))?;
    match clone_child(Parent::Grand) {
        Ok(Some(pid)) => wire::send(reply.as_fd(), &Message::Created { pid }, None)
            .map_err(|error| Failure::step("reply", error)),
        Ok(None) => hold(),
        Err(error) => Err(Failure::step("clone", error)),
    }
}

/// The maps must be written from outside by who may change users there: this helper.
fn with_user_namespace(map: IdMap, reply: &OwnedFd) -> Result<(), Failure> {
    let pipe = || {
        nix::unistd::pipe2(OFlag::O_CLOEXEC)
            .map(|(reader, writer)| (File::from(reader), File::from(writer)))
            .map_err(|errno| Failure::step("pipe", errno))
    };
    let ((mut is_made, made), (is_mapped, mut mapped)) = (pipe()?, pipe()?);
    let holder = clone_child(Parent::Grand).map_err(|error| Failure::step("clone", error))?;
    let Some(pid) = holder else {
        // Its copies of the helper's ends would keep it from seeing the helper fail.
        drop((is_made, mapped));
        let result = become_holder(made, is_mapped, reply);
        if let Err(failure) = &result {
            let _ = wire::send(reply.as_fd(), &Message::Failed(failure.clone()), None);
        }
        std::process::exit(i32::from(result.is_err()))
    };
    drop((made, is_mapped));
    let mut mark = [0];
    if !matches!(is_made.read(&mut mark), Ok(1)) {
        // It has said why.
        return Ok(());
    }
    let line = format!("0 {} {}\n", map.first, map.length);
    for name in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{name}"), &line)
            .map_err(|error| Failure::step(&format!("write {name}"), error))?;
    }
    mapped
        .write_all(&mark)
        .map_err(|error| Failure::step("tell the holder", error))
}

fn become_holder(mut made: File, mut is_mapped: File, reply: &OwnedFd) -> Result<(), Failure> {
    // Root of a user namespace may not lower it.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(|errno| Failure::step("unshare user namespace", errno))?;
    // Or its maps in /proc belong to a user that nobody is.
    prctl::set_dumpable(true).map_err(|errno| Failure::step("set dumpable", errno))?;
    let broken = |error| Failure::step("wait for the maps", error);
    made.write_all(&[0]).map_err(broken)?;
    drop(made);
    let mut mark = [0];
    if is_mapped.read(&mut mark).map_err(broken)? != 1 {
        return Err(Failure::new(
            FailureKind::Internal,
            "the user namespace got no maps",
        ));
    }
    let root = |errno| Failure::step("become root of the user namespace", errno);
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[]).map_err(root)?;
    setresgid(gid, gid, gid).map_err(root)?;
    setresuid(uid, uid, uid).map_err(root)?;
    // Changing users took it away, and with it the way of containers to the namespaces in /proc of the pause process.
    prctl::set_dumpable(true).map_err(|errno| Failure::step("set dumpable", errno))?;
    hold_in_new_pid_namespace(reply)
}

/// Waits for ever. The kernel reaps orphans of the namespace by itself when SIGCHLD is ignored.
fn hold() -> ! {
    // SAFETY: SIG_IGN installs no handler code.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) };
    let _ = std::fs::write("/proc/self/comm", "pause");
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
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
