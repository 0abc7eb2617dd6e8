//! What a shim writes down in its bundle so that `delete` can clean up after a crash: pids with start times, cgroups.
//!
//! A bare pid is never enough: the kernel reuses them, so each comes with the start time of its process. Written by the
//! daemon, read by `delete` and by a second `start`.

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Name of the record in the bundle.
pub const RECORD_FILE: &str = "shim.json";
/// Name of the file with the shim's address in the bundle; containerd's convention.
pub const ADDRESS_FILE: &str = "address";
/// How often a killed process is looked at until it is gone.
const GONE_POLL: Duration = Duration::from_millis(10);

/// A process that cannot be mistaken for a later one of the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Pid in the host's pid namespace.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks after boot.
    pub start_time: u64,
}

impl ProcessRef {
    /// The process that has `pid` now.
    ///
    /// # Errors
    /// When there is none.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name in parentheses may hold anything, a ')' too: fields are counted from the last one.
        let start_time = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(19))
            .and_then(|field| field.parse().ok())
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "no start time in /proc/<pid>/stat",
                )
            })?;
        Ok(Self { pid, start_time })
    }

    /// Whether that very process still runs (a zombie counts as gone).
    pub fn alive(&self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == *self) && !is_zombie(self.pid)
    }

    /// Kills that very process and waits until it is gone, at most `limit`. Gone already: Ok.
    ///
    /// # Errors
    /// When the signal is refused, or the process outlives the limit.
    pub fn kill(&self, limit: Duration) -> io::Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(());
        };
        // The descriptor is taken first and the start time compared after: from then on the pid cannot change hands.
        let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if !self.alive() {
            return Ok(());
        }
        match rustix::process::pidfd_send_signal(&fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
        let deadline = Instant::now() + limit;
        while self.alive() {
            if Instant::now() >= deadline {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("process {} outlived SIGKILL", self.pid),
                ));
            }
            std::thread::sleep(GONE_POLL);
        }
        Ok(())
    }
}

fn is_zombie(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| {
            stat.rsplit_once(") ")
                .map(|(_, rest)| rest.starts_with(['Z', 'X']))
        })
        .unwrap_or(false)
}

/// The record: everything of a shim that outlives its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Record {
    /// The daemon.
    pub shim: Option<ProcessRef>,
    /// The vmm child.
    pub vmm: Option<ProcessRef>,
    /// Path of the shim's socket.
    pub socket: PathBuf,
    /// Cgroup directories that the shim made, parents first.
    pub cgroups: Vec<PathBuf>,
    /// The pod's network namespace, with taps of ours in it.
    pub netns: Option<PathBuf>,
    /// Source of the mounts on the host that show the guest's.
    #[serde(default)]
    pub shown: String,
}

impl Record {
    /// Reads the record of a bundle. None: there is none, or it cannot be read as one (a crash before the first write).
    pub fn load(bundle: &Path) -> Option<Self> {
        let bytes = std::fs::read(bundle.join(RECORD_FILE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes the record, whole or not at all (temporary file, rename), readable by root only.
    ///
    /// # Errors
    /// When the bundle cannot be written.
    pub fn store(&self, bundle: &Path) -> io::Result<()> {
        write_whole(&bundle.join(RECORD_FILE), &serde_json::to_vec_pretty(self)?)
    }

    /// Removes record and address: the shim ends in order and leaves nothing to clean up.
    pub fn remove(bundle: &Path) {
        for name in [RECORD_FILE, ADDRESS_FILE] {
            // Missing is fine; anything else is the next `delete`'s to meet.
            drop(std::fs::remove_file(bundle.join(name)));
        }
    }
}

/// Writes a file of mode 0600 whole or not at all.
///
/// # Errors
/// When its directory cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    drop(file);
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_is_not_killed() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("sleep runs");
        let real = ProcessRef::of(child.id() as i32).expect("it runs");
        let stale = ProcessRef {
            start_time: real.start_time + 1,
            ..real
        };
        assert!(real.alive());
        assert!(!stale.alive());
        stale.kill(Duration::from_secs(5)).expect("nothing to kill");
        assert!(real.alive());
        real.kill(Duration::from_secs(5)).expect("killed");
        assert!(!real.alive());
        let _ = child.wait();
        real.kill(Duration::from_secs(5)).expect("gone is fine");
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(Record::load(dir.path()).is_none());
        let record = Record {
            shim: ProcessRef::of(std::process::id() as i32).ok(),
            vmm: None,
            socket: "/run/x".into(),
            cgroups: vec!["/sys/fs/cgroup/x".into()],
            netns: Some("/run/netns/x".into()),
            shown: "boxlite:x".to_owned(),
        };
        record.store(dir.path()).expect("stored");
        assert_eq!(Record::load(dir.path()), Some(record));
    }
}
