//! The VM's cgroup v2 tree: who lives where, and the few operations on a cgroup.
//!
//! ```text
//! /agent                the agent, the spawner and their helpers
//! /pod                  limits that keep the agent alive: memory, processes
//! /pod/<container>      a container: its limits, its init process, the root of its cgroup namespace
//! /pod/<container>/x<n> one exec'd process and all it starts; no controllers, it exists to be killed whole
//! ```
//!
//! A container's own cgroup enables no controllers below itself, so the kernel's "no internal processes" rule does not
//! apply and the container sees its limits in its own `/sys/fs/cgroup`. What the figures in the files mean is
//! [`resources`] and [`stats`]; [`processes`] looks at who is inside; which devices its processes may use is a BPF program
//! ([`devices`]).

mod bpf;
mod devices;
pub mod processes;
pub mod resources;
pub mod stats;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where cgroup v2 is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// The agent's cgroup below [`MOUNT`].
const AGENT: &str = "agent";
/// The parent of all containers below [`MOUNT`].
pub const POD: &str = "pod";
/// Memory that containers may not take, in bytes: the agent, its buffers and the kernel's own needs (measured: the agent
/// idles below 6 MiB; a container costs it at most its 1 MiB output buffer).
const MEMORY_RESERVE: u64 = 16 << 20;
/// Processes that containers may not take: the agent, the spawner, its helpers and kernel threads.
const PROCESS_RESERVE: u64 = 256;
/// Controllers that containers get, where the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"];
/// How often a cgroup that still has dying processes is tried again.
const REMOVE_ATTEMPTS: u32 = 50;
/// Pause between two attempts.
const REMOVE_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// A file of the cgroup tree that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// Making or removing the directory.
    #[error("cgroup {path}: {step}")]
    Directory {
        path: String,
        step: &'static str,
        #[source]
        source: io::Error,
    },
    /// Reading or writing a file.
    #[error("cgroup file {path} = {value:?}")]
    File {
        path: String,
        value: String,
        #[source]
        source: io::Error,
    },
    /// A resource setting that makes no sense.
    #[error("resource {field}: {reason}")]
    Resource { field: String, reason: String },
}

/// A cgroup, by its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The pod's cgroup, parent of all containers.
    pub fn pod() -> Self {
        Self {
            path: Path::new(MOUNT).join(POD),
        }
    }

    /// A child by its name, which must be one path component.
    pub fn child(&self, name: &str) -> Self {
        Self {
            path: self.path.join(name),
        }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path below the mount, as in an OCI spec's `cgroupsPath`.
    pub fn relative(&self) -> String {
        let below = self.path.strip_prefix(MOUNT).unwrap_or(&self.path);
        format!("/{}", below.display())
    }

    /// Makes it; it may be there.
    pub fn create(&self) -> Result<(), CgroupError> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(|source| self.directory_error("mkdir", source)),
        }
    }

    /// Writes one of its files.
    pub fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|source| CgroupError::File {
            path: path.display().to_string(),
            value: value.to_owned(),
            source,
        })
    }

    /// Forbids its processes all devices but the standard ones, those of `rules` and `own`; nothing where the rules allow
    /// everything.
    pub fn limit_devices(
        &self,
        rules: &[LinuxDeviceCgroup],
        own: &[LinuxDevice],
    ) -> Result<(), CgroupError> {
        match devices::program(rules, own)? {
            Some(program) => bpf::attach(&self.path, &program)
                .map_err(|source| self.directory_error("limit devices", source)),
            None => Ok(()),
        }
    }

    /// Reads one of its files; `None` where the kernel or the missing controller doesn't offer it.
    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// Kills everything in it and below. Succeeds on a cgroup that is gone.
    pub fn kill(&self) -> Result<(), CgroupError> {
        match self.write("cgroup.kill", "1") {
            Err(CgroupError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(())
            }
            other => other,
        }
    }

    /// Stops or continues all its processes. The kernel answers at once and freezes soon after.
    pub fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// All processes in it and below, in the VM's own numbering.
    pub fn processes(&self) -> Vec<i32> {
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
        // A process of another PID namespace would read as 0.
        found.retain(|pid| *pid > 0);
        found
    }

    /// Whether no process is left in it or below.
    pub fn is_empty(&self) -> bool {
        match self.read("cgroup.events") {
            Some(events) => events.lines().any(|line| line == "populated 0"),
            None => true,
        }
    }

    /// Kills what is in it and removes it with its children. Blocks up to about a second for processes that are dying.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.kill()?;
        for _ in 1..REMOVE_ATTEMPTS {
            match remove_tree(&self.path) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(REMOVE_PAUSE)
                }
                other => return other.map_err(|source| self.directory_error("rmdir", source)),
            }
        }
        remove_tree(&self.path).map_err(|source| self.directory_error("rmdir", source))
    }

    fn directory_error(&self, step: &'static str, source: io::Error) -> CgroupError {
        CgroupError::Directory {
            path: self.path.display().to_string(),
            step,
            source,
        }
    }
}

/// Removes a cgroup and those below it, leaves first. Files of cgroupfs go with their directory.
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

/// Makes the tree at boot and moves the agent into its place.
///
/// # Errors
/// The tree could not be made. A controller the kernel lacks is no error: its limits fail when they are asked for.
pub fn lay_out() -> Result<(), CgroupError> {
    let root = Cgroup {
        path: PathBuf::from(MOUNT),
    };
    let agent = root.child(AGENT);
    agent.create()?;
    agent.write("cgroup.procs", "0")?;
    enable_controllers(&root);
    let pod = Cgroup::pod();
    pod.create()?;
    enable_controllers(&pod);
    limit_pod(&pod);
    Ok(())
}

/// One at a time: a single unknown name would make the kernel refuse all of them.
fn enable_controllers(cgroup: &Cgroup) {
    for controller in CONTROLLERS {
        let _ = cgroup.write("cgroup.subtree_control", &format!("+{controller}"));
    }
}

/// Keeps enough memory and process numbers for the agent, whatever the containers do.
fn limit_pod(pod: &Cgroup) {
    if let Some(limit) = pod_memory_limit() {
        let _ = pod.write("memory.max", &limit.to_string());
    }
    let threads = fs::read_to_string("/proc/sys/kernel/threads-max");
    let pids = fs::read_to_string("/proc/sys/kernel/pid_max");
    let limit = [threads, pids]
        .into_iter()
        .flatten()
        .filter_map(|text| text.trim().parse::<u64>().ok())
        .min();
    if let Some(limit) = limit {
        let _ = pod.write(
            "pids.max",
            &limit
                .saturating_sub(PROCESS_RESERVE)
                .max(limit / 2)
                .to_string(),
        );
    }
}

/// The most that all containers together may have, in bytes: what the agent needs is taken off.
fn pod_memory_limit() -> Option<u64> {
    memory_total().map(|total| total.saturating_sub(MEMORY_RESERVE).max(total / 2))
}

/// Applies new limits to the pod's own cgroup. A memory limit beyond what the agent can spare becomes that.
///
/// # Errors
/// As [`resources::apply`].
pub fn update_pod(limits: &oci_spec::runtime::LinuxResources) -> Result<(), CgroupError> {
    let most = pod_memory_limit();
    for (file, value) in resources::settings(limits)? {
        let value = if file == "memory.max" {
            bounded(&value, most)
        } else {
            value
        };
        Cgroup::pod().write(&file, &value)?;
    }
    Ok(())
}

fn bounded(wanted: &str, most: Option<u64>) -> String {
    match (wanted.parse::<u64>(), most) {
        (Ok(wanted), Some(most)) => wanted.min(most).to_string(),
        (Err(_), Some(most)) => most.to_string(),
        (_, None) => wanted.to_owned(),
    }
}

/// The VM's memory in bytes, as the kernel has it after its own share.
pub fn memory_total() -> Option<u64> {
    meminfo("MemTotal:")
}

/// A line of /proc/meminfo, in bytes.
pub fn meminfo(key: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::bounded;

    #[test]
    fn the_agents_share_is_out_of_reach() {
        assert_eq!(bounded("100", Some(70)), "70");
        assert_eq!(bounded("50", Some(70)), "50");
        assert_eq!(bounded("max", Some(70)), "70");
        assert_eq!(bounded("max", None), "max");
    }
}
