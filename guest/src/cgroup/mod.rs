//! The VM's cgroup v2 tree and operations on a cgroup.
//!
//! ```text
//! /agent                the agent, the spawner and their helpers
//! /pod                  limits that protect the agent: memory, processes
//! /pod/<container>      a container: its limits, its init process, the root of its cgroup namespace
//! /pod/<container>/x<n> one exec'd process and its descendants; no controllers, used to kill them together
//! ```
//!
//! A container's cgroup enables no controllers for its children, so the kernel's "no internal processes" rule does
//! not apply and the container sees its limits in its own `/sys/fs/cgroup`. [`resources`] and [`stats`] convert
//! values of the files; [`processes`] inspects processes; [`devices`] compiles device rules to a BPF program,
//! [`sockets`] the node's addresses of a pod in the host's network.

mod bpf;
mod devices;
pub(crate) mod error;
mod instruction;
pub(crate) mod pod;
pub(crate) mod processes;
pub(crate) mod resources;
pub(crate) mod sockets;
pub(crate) mod stats;

pub(crate) use bpf::Hook;
pub(crate) use instruction::Instruction;

use error::CgroupError;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Mount point of cgroup v2.
pub(crate) const MOUNT: &str = "/sys/fs/cgroup";
/// Parent of all containers below [`MOUNT`].
pub(crate) const POD: &str = "pod";
/// Maximum number of attempts to remove a cgroup whose processes are dying.
const REMOVE_ATTEMPTS: u32 = 50;
/// Delay between two attempts.
const REMOVE_RETRY_DELAY: std::time::Duration = std::time::Duration::from_millis(20);

/// A cgroup, identified by its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Returns the root of the tree.
    pub(crate) fn root() -> Self {
        Self {
            path: PathBuf::from(MOUNT),
        }
    }

    /// Returns the pod's cgroup, the parent of all containers.
    pub(crate) fn pod() -> Self {
        Self {
            path: Path::new(MOUNT).join(POD),
        }
    }

    /// Returns a child; `name` must be one path component.
    pub(crate) fn child(&self, name: &str) -> Self {
        Self {
            path: self.path.join(name),
        }
    }

    /// Returns the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the path below the mount point, as in an OCI spec's `cgroupsPath`.
    pub(crate) fn relative(&self) -> String {
        let below = self.path.strip_prefix(MOUNT).unwrap_or(&self.path);
        format!("/{}", below.display())
    }

    /// Creates the cgroup if it does not exist.
    pub(crate) fn create(&self) -> Result<(), CgroupError> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(|source| self.directory_error("create", source)),
        }
    }

    /// Writes one of its files.
    pub(crate) fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|source| CgroupError::File {
            path: path.display().to_string(),
            value: value.to_owned(),
            source,
        })
    }

    /// Restricts devices to the standard ones and those of `rules` and `own`; does nothing if the rules allow
    /// everything.
    pub(crate) fn limit_devices(
        &self,
        rules: &[LinuxDeviceCgroup],
        own: &[LinuxDevice],
    ) -> Result<(), CgroupError> {
        match devices::program(rules, own)? {
            Some(program) => bpf::attach(&self.path, Hook::Device, &program, None)
                .map(drop)
                .map_err(|source| self.directory_error("limit devices of", source)),
            None => Ok(()),
        }
    }

    /// Attaches a program for the sockets of its processes, in place of `replaced`. Returns the program.
    pub(crate) fn attach_to_sockets(
        &self,
        hook: Hook,
        program: &[Instruction],
        replaced: Option<&OwnedFd>,
    ) -> Result<OwnedFd, CgroupError> {
        bpf::attach(&self.path, hook, program, replaced)
            .map_err(|source| self.directory_error("attach a program to sockets of", source))
    }

    /// Reads one of its files; `None` if the kernel or the controller does not provide it.
    pub(crate) fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// Kills all processes in it and its descendants. Succeeds if the cgroup does not exist.
    pub(crate) fn kill(&self) -> Result<(), CgroupError> {
        match self.write("cgroup.kill", "1") {
            Err(CgroupError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(())
            }
            other => other,
        }
    }

    /// Freezes or thaws all processes. The call returns before the kernel has frozen them.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Returns the PIDs of all processes in it and its descendants, in the VM's initial PID namespace.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut pending = vec![self.path.clone()];
        while let Some(directory) = pending.pop() {
            if let Ok(text) = fs::read_to_string(directory.join("cgroup.procs")) {
                found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            }
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            pending.extend(
                entries
                    .flatten()
                    .filter(|entry| entry.path().is_dir())
                    .map(|entry| entry.path()),
            );
        }
        // A process of another PID namespace reads as 0.
        found.retain(|pid| *pid > 0);
        found
    }

    /// Returns whether it and its descendants have no processes.
    pub(crate) fn is_empty(&self) -> bool {
        match self.read("cgroup.events") {
            Some(events) => events.lines().any(|line| line == "populated 0"),
            None => true,
        }
    }

    /// Kills all processes and removes the cgroup with its descendants. Blocks up to about a second for dying
    /// processes.
    pub(crate) fn remove(&self) -> Result<(), CgroupError> {
        self.kill()?;
        for _ in 1..REMOVE_ATTEMPTS {
            match remove_tree(&self.path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(REMOVE_RETRY_DELAY)
                }
                other => return other.map_err(|source| self.directory_error("remove", source)),
            }
        }
        remove_tree(&self.path).map_err(|source| self.directory_error("remove", source))
    }

    fn directory_error(&self, step: &'static str, source: io::Error) -> CgroupError {
        CgroupError::Directory {
            path: self.path.display().to_string(),
            step,
            source,
        }
    }
}

/// Removes a cgroup and its descendants, leaves first. Files of cgroupfs disappear with their directory.
fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
