//! Role *exec*: runs a further process in a container.
//!
//! Implemented with system calls instead of libcontainer's tenant builder, which needs the on-disk state of a
//! *running* container, forks three times, starts the program before its PID is known, and reports a missing program
//! only as text. An exec probe does this every few seconds in every container. Steps and order are those of runc.
//!
//! The helper joins the cgroup and the namespaces and clones the process; the process waits until the agent has
//! registered its PID, drops its privileges and executes the program.

use super::clone::{Parent, clone_child};
use super::confine::Confined;
use super::executable::errno_text;
use super::user::{self, ResolvedUser};
use super::wire::{self, ExecRequest, Failure, FailureKind, Message, ProcessPlan};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, setgroups, setresgid, setresuid, setsid,
};
use oci_spec::runtime::{PosixRlimit, PosixRlimitType};
use rustix::fs::FileType;
use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

/// Namespaces private to a container, except the user namespace; the others are the VM's.
const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWPID)
    .union(CloneFlags::CLONE_NEWCGROUP);

/// Creates the process and reports its PID.
pub(crate) fn run(
    request: &ExecRequest,
    descriptors: Vec<OwnedFd>,
    reply: &OwnedFd,
) -> Result<(), Failure> {
    let mut descriptors = descriptors.into_iter();
    let container = descriptors
        .next()
        .ok_or_else(|| Failure::new(FailureKind::Internal, "the container's pidfd is missing"))?;
    let stdio: Vec<OwnedFd> = descriptors.collect();
    // From here on, processes of the container must not be able to inspect this one.
    prctl::set_dumpable(false)
        .map_err(|errno| Failure::step("clear the dumpable attribute", errno))?;
    fs::write(
        "/proc/self/oom_score_adj",
        request.process.oom_score_adj.to_string(),
    )
    .map_err(|error| Failure::step("set oom_score_adj", error))?;
    fs::write(&request.cgroup_procs, "0")
        .map_err(|error| Failure::step("join the cgroup", error))?;
    let own = if request.user_namespace {
        NAMESPACES | CloneFlags::CLONE_NEWUSER
    } else {
        NAMESPACES
    };
    setns(&container, own).map_err(|errno| match errno {
        Errno::ESRCH => Failure::new(FailureKind::Internal, "the container has ended"),
        errno => Failure::step("join the namespaces", errno),
    })?;
    match clone_child(Parent::Grand) {
        Ok(Some(pid)) => wire::send(reply.as_fd(), &Message::Created { pid }, None)
            .map_err(|error| Failure::step("send the reply", error)),
        Ok(None) => {
            let made = become_program(&request.process, request.user_namespace, stdio, reply);
            let failure = match made {
                Ok(never) => match never {},
                Err(failure) => failure,
            };
            let _ = wire::send(reply.as_fd(), &Message::Failed(failure), None);
            std::process::exit(127)
        }
        Err(error) => Err(Failure::step("clone the process", error)),
    }
}

/// Runs in the new process, from its first instruction to the exec.
fn become_program(
    plan: &ProcessPlan,
    user_namespace: bool,
    stdio: Vec<OwnedFd>,
    reply: &OwnedFd,
) -> Result<Infallible, Failure> {
    let mut mark = [0];
    match wire::receive_with(reply.as_fd(), &mut mark) {
        Ok((1, _)) => {}
        _ => {
            return Err(Failure::new(
                FailureKind::Internal,
                "the agent closed the request",
            ));
        }
    }
    setsid().map_err(|errno| Failure::step("create a session", errno))?;
    if user_namespace {
        become_namespace_root()?;
    }
    let user = user::resolve(Path::new("/"), &plan.user)
        .map_err(|error| Failure::new(FailureKind::UserNotFound, error.to_string()))?;
    if plan.terminal {
        open_terminal(plan.console_size, &user, reply)?;
    } else {
        connect_stdio(&stdio, &user)?;
    }
    drop(stdio);
    for limit in &plan.rlimits {
        set_limit(limit)?;
    }
    // As root first: the user may lack access to a directory that the runtime can enter.
    let entered = enter_directory(&plan.cwd);
    change_user(&user)?;
    let confined = Confined::set(&plan.confinement)?;
    if entered.is_err() {
        enter_directory(&plan.cwd).map_err(|errno| {
            let message = format!(
                "invalid working_dir: {}: {}",
                plan.cwd.display(),
                errno_text(errno)
            );
            Failure::new(FailureKind::InvalidArgument, message)
        })?;
    }
    if let Some(mask) = plan.user.umask {
        umask(Mode::from_bits_truncate(mask));
    }
    let mut env = plan.env.clone();
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", user.home));
    }
    confined.execute(&plan.args, &env)
}

/// After joining a user namespace this process still has a user of the parent namespace, who owns nothing in it.
fn become_namespace_root() -> Result<(), Failure> {
    let failed = |errno| Failure::step("become root of the user namespace", errno);
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[]).map_err(failed)?;
    setresgid(gid, gid, gid).map_err(failed)?;
    setresuid(uid, uid, uid).map_err(failed)
}

fn enter_directory(cwd: &Path) -> Result<(), Errno> {
    chdir(cwd)?;
    // A working directory outside the root (reachable through a leaked descriptor) reads as unreachable.
    match std::env::current_dir() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err(Errno::ENOENT),
    }
}

fn connect_stdio(stdio: &[OwnedFd], user: &ResolvedUser) -> Result<(), Failure> {
    let [stdin, stdout, stderr] = stdio else {
        return Err(Failure::new(
            FailureKind::Internal,
            "standard streams are missing",
        ));
    };
    // The user must be able to reopen /dev/stdout. Pipes only: /dev/null belongs to the VM.
    for end in stdio {
        let is_pipe = rustix::fs::fstat(end)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
        if is_pipe {
            let _ = nix::unistd::fchown(end, Some(Uid::from_raw(user.uid)), None);
        }
    }
    let connected = dup2_stdin(stdin)
        .and_then(|()| dup2_stdout(stdout))
        .and_then(|()| dup2_stderr(stderr));
    connected.map_err(|errno| Failure::step("connect the standard streams", errno))
}

mod terminal_ioctl {
    nix::ioctl_write_int_bad!(set_controlling, libc::TIOCSCTTY);
    nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, libc::winsize);
}

/// Sets the size of a terminal.
pub(crate) fn set_terminal_size(terminal: impl AsFd, rows: u16, cols: u16) -> Result<(), Errno> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open and the pointer is to a live winsize, which the kernel only reads.
    unsafe { terminal_ioctl::set_size(terminal.as_fd().as_raw_fd(), &size) }.map(|_| ())
}

/// Opens a terminal of the container's own devpts, so that its name exists in the container.
fn open_terminal(size: (u16, u16), user: &ResolvedUser, reply: &OwnedFd) -> Result<(), Failure> {
    let failed = |errno| Failure::step("open a terminal", errno);
    let pty = nix::pty::openpty(None, None).map_err(failed)?;
    if size != (0, 0) {
        set_terminal_size(&pty.master, size.0, size.1).map_err(failed)?;
    }
    let _ = nix::unistd::fchown(&pty.slave, Some(Uid::from_raw(user.uid)), None);
    // SAFETY: the descriptor is open; the ioctl takes a plain number.
    unsafe { terminal_ioctl::set_controlling(pty.slave.as_raw_fd(), 0) }.map_err(failed)?;
    let connected = dup2_stdin(&pty.slave)
        .and_then(|()| dup2_stdout(&pty.slave))
        .and_then(|()| dup2_stderr(&pty.slave));
    connected.map_err(failed)?;
    wire::send(reply.as_fd(), &Message::Console, Some(pty.master.as_fd()))
        .map_err(|error| Failure::step("send the reply", error))
}

fn change_user(user: &ResolvedUser) -> Result<(), Failure> {
    let failed = |errno| Failure::step("change the user", errno);
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<Gid> = user
        .additional_gids
        .iter()
        .copied()
        .map(Gid::from_raw)
        .collect();
    // Capabilities must survive the change of the user until the requested ones are set.
    caps::securebits::set_keepcaps(true)
        .map_err(|error| Failure::step("keep capabilities", error))?;
    setgroups(&groups).map_err(failed)?;
    setresgid(gid, gid, gid).map_err(failed)?;
    setresuid(uid, uid, uid).map_err(failed)?;
    caps::securebits::set_keepcaps(false).map_err(|error| Failure::step("keep capabilities", error))
}

fn set_limit(limit: &PosixRlimit) -> Result<(), Failure> {
    let resource = match limit.typ() {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    };
    setrlimit(resource, limit.soft(), limit.hard())
        .map_err(|errno| Failure::step(&format!("set rlimit {}", limit.typ()), errno))
}
