//! [`ProcessId`]: a process that cannot be mistaken for a later one with the same pid, over restarts of boxlite-cri
//! and of the host.

use serde::{Deserialize, Serialize};

/// pid, start time and boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// In the host's PID namespace.
    pub pid: i32,
    /// Clock ticks after boot: field 22 of `/proc/<pid>/stat` (proc(5)).
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl ProcessId {
    /// The process that has `pid` now; `None` where there is none.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self {
            pid,
            start_time: start_time(pid)?,
            boot_id: boot_id(),
        })
    }

    /// Whether that very process still runs; a zombie does not.
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time) && boot_id() == self.boot_id
    }
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|id| id.trim().to_owned())
        .unwrap_or_default()
}

/// The start time of a process that is not a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything: fields are counted from the last ')'.
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

    #[test]
    fn a_pid_alone_is_not_enough() {
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let id = ProcessId::of(i32::try_from(child.id()).unwrap()).unwrap();
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
}
