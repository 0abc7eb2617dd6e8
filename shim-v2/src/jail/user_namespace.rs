//! [`UserNamespace`]: the jail's user namespace, which maps each id to itself.
//!
//! A file server needs capabilities to act for any user of the guest. In a user namespace they hold for files whose owners
//! are mapped, which is every file of the jail, and for nothing else of the host's kernel. The map must be written by a
//! process outside, so a helper is forked while the process has one thread; it ends before the VMM starts.
//!
//! JUSTIFICATION for unsafe: a process without exec is not available otherwise, and an exec costs milliseconds of each boot.

use super::{JailError, at_path, system};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};
use std::fs;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// The maps of a process, in its /proc directory.
const MAPS: [&str; 2] = ["uid_map", "gid_map"];

/// A user namespace that has not been created yet, and the helper that will write its maps.
pub(super) struct UserNamespace {
    helper: Pid,
    /// One byte starts the helper; closing it ends the helper.
    start: File,
}

impl UserNamespace {
    /// Forks the helper, which keeps the current mount namespace. Called with one thread.
    ///
    /// # Errors
    /// The kernel refused.
    pub(super) fn prepare() -> Result<Self, JailError> {
        let proc = Path::new("/proc");
        // Not getpid(): this process is in a separate PID namespace, and /proc shows the shim's.
        let link = proc.join("self");
        let process = fs::read_link(&link).map_err(at_path("read", &link))?;
        let process = proc.join(process);
        let mut maps = Vec::new();
        for name in MAPS {
            let path = process.join(name);
            let current = fs::read_to_string(&path).map_err(at_path("read", &path))?;
            maps.push((path, identity(&current)));
        }
        let step = "create a pipe";
        let (wait, start) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(system(step))?;
        // SAFETY: the process has one thread, so no lock can be held in the child, which may allocate and open files.
        let forked = unsafe { fork() };
        match forked.map_err(system("fork"))? {
            ForkResult::Child => {
                drop(start);
                let written = write_maps(&mut File::from(wait), &maps);
                std::process::exit(i32::from(written.is_err()));
            }
            ForkResult::Parent { child } => Ok(Self {
                helper: child,
                start: File::from(start),
            }),
        }
    }

    /// Moves this process into the namespace and gives it all capabilities there. Returns false on a host without user
    /// namespaces for more processes: nothing has changed then.
    ///
    /// # Errors
    /// The maps could not be written. The process is in the namespace, without a user.
    pub(super) fn enter(mut self) -> Result<bool, JailError> {
        let entered = match unshare(CloneFlags::CLONE_NEWUSER) {
            Ok(()) => true,
            Err(error) => {
                eprintln!("vmm: running without a user namespace: {error}");
                false
            }
        };
        if entered {
            self.start
                .write_all(&[0])
                .map_err(|_| system("start the helper")(nix::Error::EPIPE))?;
        }
        drop(self.start);
        match waitpid(self.helper, None).map_err(system("wait for the helper"))? {
            WaitStatus::Exited(_, 0) => Ok(entered),
            _ => Err(system("map the users")(nix::Error::EPERM)),
        }
    }
}

/// Waits for the byte, then writes the maps. Nothing is written if the parent has ended or remains outside.
fn write_maps(start: &mut File, maps: &[(PathBuf, String)]) -> std::io::Result<()> {
    if start.read(&mut [0])? == 0 {
        return Ok(());
    }
    for (path, map) in maps {
        fs::write(path, map)?;
    }
    Ok(())
}

/// Returns the map of each id of `current`, the map of the present namespace, to itself.
fn identity(current: &str) -> String {
    let mut map = String::new();
    for line in current.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if let [first, _, length] = fields.as_slice() {
            map += &format!("{first} {first} {length}\n");
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::identity;

    #[test]
    fn identity_maps_each_extent_to_itself() {
        let whole = "         0          0 4294967295\n";
        assert_eq!(identity(whole), "0 0 4294967295\n");
        let container = "0 100000 65536\n70000 200000 10\n";
        assert_eq!(identity(container), "0 0 65536\n70000 70000 10\n");
    }
}
