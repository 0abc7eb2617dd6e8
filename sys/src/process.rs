//! [`ProcessId`]: identifies a process across reuse of its pid, restarts of the daemon and reboots of the host; [`family`]:
//! its descendants.

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant};

/// Interval between two checks whether a killed process is gone.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Pid, start time and boot of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Pid in the caller's PID namespace.
    pub pid: i32,
    /// Clock ticks after boot: field 22 of `/proc/<pid>/stat` (proc(5)).
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`. Files in a tmpfs that omit it are of the current boot.
    #[serde(default = "boot_id")]
    pub boot_id: String,
}

impl ProcessId {
    /// Identifies the process that has `pid` now; `None` if there is none or it is a zombie.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self {
            pid,
            start_time: start_time(pid)?,
            boot_id: boot_id(),
        })
    }

    /// Returns whether this process still runs. A zombie does not.
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time) && boot_id() == self.boot_id
    }

    /// Kills this process and waits until it is gone, at most `limit`. Succeeds if it is gone already. Blocks.
    ///
    /// # Errors
    /// Fails if the signal is refused, or the process outlives the limit.
    pub fn kill(&self, limit: Duration) -> io::Result<()> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(());
        };
        // The descriptor is opened before the start time is compared: from then on the pid cannot change hands.
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
                    format!("process {} survived SIGKILL for {limit:?}", self.pid),
                ));
            }
            std::thread::sleep(EXIT_POLL_INTERVAL);
        }
        Ok(())
    }
}

/// Returns a process and its descendants, as far as they exist; a process that forks meanwhile may have others.
pub fn family(pid: i32) -> BTreeSet<i32> {
    let mut found = BTreeSet::from([pid]);
    let mut rest = vec![pid];
    while let Some(parent) = rest.pop() {
        let threads = std::fs::read_dir(format!("/proc/{parent}/task"));
        for thread in threads.into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(thread.path().join("children"));
            let children = children.unwrap_or_default();
            let children = children
                .split_whitespace()
                .filter_map(|pid| pid.parse().ok());
            rest.extend(children.filter(|child| found.insert(*child)));
        }
    }
    found
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

/// Returns the start time of a process that is not a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may contain anything: fields are counted from the last ')'.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleep() -> (std::process::Child, ProcessId) {
        let child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id().cast_signed()).unwrap();
        (child, id)
    }

    #[test]
    fn alive_with_other_start_time_or_boot_returns_false() {
        let (mut child, id) = sleep();
        assert!(id.alive());
        let mut other = id.clone();
        other.start_time += 1;
        assert!(!other.alive());
        let mut other = id.clone();
        other.boot_id.clear();
        assert!(!other.alive());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!id.alive());
    }

    #[test]
    fn kill_spares_a_process_that_reuses_the_pid() {
        let limit = Duration::from_secs(5);
        let (mut child, id) = sleep();
        let stale = ProcessId {
            start_time: id.start_time + 1,
            ..id.clone()
        };
        assert!(id.alive());
        assert!(!stale.alive());
        stale.kill(limit).expect("nothing to kill");
        assert!(id.alive());
        id.kill(limit).expect("killed");
        assert!(!id.alive());
        let _ = child.wait();
        id.kill(limit).expect("already gone");
    }

    #[test]
    fn deserialize_without_boot_id_takes_the_current_boot() {
        let own = ProcessId::of(std::process::id().cast_signed()).unwrap();
        let json = format!("{{\"pid\":{},\"start_time\":{}}}", own.pid, own.start_time);
        assert_eq!(serde_json::from_str::<ProcessId>(&json).unwrap(), own);
    }
}
