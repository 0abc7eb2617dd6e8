//! Role *pause*: holds the pod's shared PID namespace, and its user namespace if it has one. Its process is PID 1 in
//! the namespace, so containers that share it do not see the agent.
//!
//! ```text
//! helper ──clone──► holder: new user namespace ─► waits for its maps ─► root in it ─► new PID namespace ──clone──► pause
//!    └──────────────────── writes uid_map, gid_map ───────┘
//! ```
//! Without a user namespace the helper is the holder.

use super::clone::{Parent, clone_child};
use super::wire::{self, Failure, FailureKind, IdMap, Message};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};

/// OOM score adjustment of the process. Very low, because all containers in its namespaces would die with it.
const OOM_SCORE: &str = "-998";

/// Creates the namespaces and the process that holds them.
pub(crate) fn run(map: Option<IdMap>, reply: &OwnedFd) -> Result<(), Failure> {
    match map {
        None => hold_in_new_pid_namespace(reply),
        Some(map) => with_user_namespace(map, reply),
    }
}

fn hold_in_new_pid_namespace(reply: &OwnedFd) -> Result<(), Failure> {
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(|errno| Failure::step("unshare the PID namespace", errno))?;
    match clone_child(Parent::Grand) {
        Ok(Some(pid)) => wire::send(reply.as_fd(), &Message::Created { pid }, None)
            .map_err(|error| Failure::step("send the reply", error)),
        Ok(None) => hold(),
        Err(error) => Err(Failure::step("clone the pause process", error)),
    }
}

/// The maps must be written by a process outside the namespace that may change users there: this helper.
fn with_user_namespace(map: IdMap, reply: &OwnedFd) -> Result<(), Failure> {
    let pipe = || {
        nix::unistd::pipe2(OFlag::O_CLOEXEC)
            .map(|(reader, writer)| (File::from(reader), File::from(writer)))
            .map_err(|errno| Failure::step("create a pipe", errno))
    };
    let ((mut created_reader, created_writer), (mapped_reader, mut mapped_writer)) =
        (pipe()?, pipe()?);
    let holder =
        clone_child(Parent::Grand).map_err(|error| Failure::step("clone the holder", error))?;
    let Some(pid) = holder else {
        // Copies of the helper's ends would keep the holder from noticing that the helper failed.
        drop((created_reader, mapped_writer));
        let result = become_holder(created_writer, mapped_reader, reply);
        if let Err(failure) = &result {
            let _ = wire::send(reply.as_fd(), &Message::Failed(failure.clone()), None);
        }
        std::process::exit(i32::from(result.is_err()))
    };
    drop((created_writer, mapped_reader));
    let mut mark = [0];
    if !matches!(created_reader.read(&mut mark), Ok(1)) {
        // The holder has reported its failure.
        return Ok(());
    }
    let line = format!("0 {} {}\n", map.first, map.length);
    for name in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{name}"), &line)
            .map_err(|error| Failure::step(&format!("write {name}"), error))?;
    }
    mapped_writer
        .write_all(&mark)
        .map_err(|error| Failure::step("notify the holder", error))
}

fn become_holder(
    mut created_writer: File,
    mut mapped_reader: File,
    reply: &OwnedFd,
) -> Result<(), Failure> {
    // Root of a user namespace may not lower it.
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(|errno| Failure::step("unshare the user namespace", errno))?;
    // Otherwise its maps in /proc belong to an unmapped user.
    prctl::set_dumpable(true)
        .map_err(|errno| Failure::step("set the dumpable attribute", errno))?;
    let broken = |error| Failure::step("wait for the maps", error);
    created_writer.write_all(&[0]).map_err(broken)?;
    drop(created_writer);
    let mut mark = [0];
    if mapped_reader.read(&mut mark).map_err(broken)? != 1 {
        return Err(Failure::new(
            FailureKind::Internal,
            "the user namespace received no maps",
        ));
    }
    let root = |errno| Failure::step("become root of the user namespace", errno);
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[]).map_err(root)?;
    setresgid(gid, gid, gid).map_err(root)?;
    setresuid(uid, uid, uid).map_err(root)?;
    // Changing users cleared it, and containers need it to access the namespaces in the pause process's /proc.
    prctl::set_dumpable(true)
        .map_err(|errno| Failure::step("set the dumpable attribute", errno))?;
    hold_in_new_pid_namespace(reply)
}

/// Waits forever. With SIGCHLD ignored, the kernel reaps the namespace's orphans.
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

/// Closes all inherited descriptors: stdio is the console's, and the agent must see the reply socket close.
fn close_all() {
    for descriptor in 0..64 {
        // SAFETY: this process owns all its descriptors and uses none of them again.
        let _ = unsafe { libc::close(descriptor) };
    }
}
