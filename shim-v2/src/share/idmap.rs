//! ID-mapped mounts for volumes of pods with a user namespace.
//!
//! On the host the files belong to user 0; in the VM the container's root has another id, and the mount maps between them.
//! The kernel takes a mapping as a user namespace, which a process must hold meanwhile: this binary in the role [`hold`].

use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitCode, Stdio};

/// First argument of the role.
pub const ROLE: &str = "user-namespace";
/// Maps the owners 0 to `length` - 1 to ids starting at `first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdMap {
    /// Id of owner 0 in the VM.
    pub first: u32,
    /// Number of ids.
    pub length: u32,
}

/// Runs the role: creates a user namespace, writes one byte, and holds the namespace until the input ends.
pub fn hold() -> ExitCode {
    let held = unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(io::Error::from)
        .and_then(|()| io::stdout().write_all(&[0]))
        .and_then(|()| io::stdout().flush())
        .and_then(|()| io::stdin().read_to_end(&mut Vec::new()));
    match held {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("failed to hold a user namespace: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Maps file owners of a detached mount and of all mounts below it. Blocks.
///
/// # Errors
/// The kernel refused; EINVAL if a file system does not support ID-mapped mounts.
pub fn apply(tree: &OwnedFd, map: IdMap) -> io::Result<()> {
    boxlite_sys::mount_attributes::set_user_namespace(tree, user_namespace(map)?.as_fd(), true)
}

/// Creates a user namespace with the map; the descriptor keeps it alive.
fn user_namespace(map: IdMap) -> io::Result<File> {
    let mut holder = Command::new("/proc/self/exe")
        .arg(ROLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = holder.id();
    let mut made = || -> io::Result<File> {
        let mut mark = [0];
        let stdout = holder.stdout.as_mut();
        stdout
            .ok_or(io::ErrorKind::BrokenPipe)?
            .read_exact(&mut mark)?;
        let line = format!("0 {} {}\n", map.first, map.length);
        std::fs::write(format!("/proc/{pid}/uid_map"), &line)?;
        std::fs::write(format!("/proc/{pid}/gid_map"), &line)?;
        File::open(format!("/proc/{pid}/ns/user"))
    };
    let result = made();
    // Closes its input and reaps it.
    drop(holder.stdin.take());
    let _exit = holder.wait();
    result
}
