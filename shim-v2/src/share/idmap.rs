//! ID-mapped copies of host directories: the owners of files as a user namespace maps them.
//!
//! For volumes of pods with a user namespace: on this host the files are user 0's, in the VM the container's root is another
//! number, and the mapping between is the mount's. A mapping is handed to the kernel as a user namespace, which a process
//! must hold for as long as that takes: this binary again, in the role [`hold`].

use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

/// First argument of the role.
pub const ROLE: &str = "user-namespace";
/// Files' owners from 0 on are others from `first` on, `length` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IdMap {
    /// What 0 is in the VM.
    pub first: u32,
    /// How many.
    pub length: u32,
}

/// The role: a new user namespace, said by one byte, and held until the input ends.
pub fn hold() -> ExitCode {
    let held = unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(io::Error::from)
        .and_then(|()| io::stdout().write_all(&[0]))
        .and_then(|()| io::stdout().flush())
        .and_then(|()| io::stdin().read_to_end(&mut Vec::new()));
    match held {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("user namespace: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Mounts `source`, with all mounts below it, on `target`, a file or directory like it, owners mapped. The caller's mount
/// namespace must be its own. Blocks.
///
/// # Errors
/// The kernel's: some file system below `source` does not know mapped mounts (EINVAL).
pub fn mount(source: &Path, target: &Path, map: IdMap) -> io::Result<()> {
    boxlite_sys::idmap::mount(source, target, user_namespace(map)?.as_fd(), true)
}

/// A user namespace with that map; the descriptor keeps it alive.
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
    // Ends its input and takes its exit.
    drop(holder.stdin.take());
    let _exit = holder.wait();
    result
}
