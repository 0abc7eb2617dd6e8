//! Processes of a pod in /proc: the shim, its descendants, and their memory.
//!
//! Identifies the product by process names and command lines only.

use crate::bail;
use crate::failure::Result;
use boxlite_sys::proc_memory;
use nix::unistd::{SysconfVar, sysconf};
use std::time::Duration;

/// Returns the pids in this PID namespace whose command line or name contains all of the words.
pub(crate) fn pids(words: &[&str]) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let Ok(args) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let name = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let text = format!(
            "{name} {}",
            String::from_utf8_lossy(&args).replace('\0', " ")
        );
        if words.iter().all(|w| text.contains(w)) {
            found.push(pid);
        }
    }
    Ok(found)
}

fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// Returns the pids of the shims that name `word`, without the processes of the same program that they started.
pub(crate) fn shims(word: &str) -> Result<Vec<i32>> {
    let all = pids(&["containerd-shim", word])?;
    let is_first = |&pid: &i32| parent(pid).is_none_or(|parent| !all.contains(&parent));
    Ok(all.iter().copied().filter(is_first).collect())
}

/// Returns the pids of a pod's shim and its descendants.
pub(crate) fn family(id: &str) -> Result<(i32, Vec<i32>)> {
    let Some(&shim) = shims(id)?.first() else {
        bail!("no shim process names the pod {}", id)
    };
    let mut below = vec![shim];
    let all = pids(&[])?;
    loop {
        let more: Vec<_> = all
            .iter()
            .copied()
            .filter(|&p| !below.contains(&p) && parent(p).is_some_and(|pp| below.contains(&pp)))
            .collect();
        if more.is_empty() {
            below.remove(0);
            return Ok((shim, below));
        }
        below.extend(more);
    }
}

/// Returns the pid of a pod's VMM: of the processes below the shim the one with the most memory.
pub(crate) fn vmm(id: &str) -> Result<i32> {
    let (_, below) = family(id)?;
    match below.into_iter().max_by_key(|&pid| rss(pid)) {
        Some(vmm) => Ok(vmm),
        None => bail!("pod {} has no VMM", id),
    }
}

/// Sends SIGKILL.
pub(crate) fn kill(pid: i32) -> Result {
    Ok(nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )?)
}

/// Returns the resident pages of a process. The VMM has the most.
pub(crate) fn rss(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    text.split(' ')
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or_default()
}

/// Returns the largest resident memory that a process has had, in bytes; 0 if it has ended.
pub(crate) fn peak(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() << 10
}

/// Returns the proportional set size in KiB.
pub(crate) fn pss(pid: i32) -> u64 {
    proc_memory::pss(pid).unwrap_or_default() >> 10
}

/// Returns the CPU time of a process in user and kernel mode.
pub(crate) fn cpu_time(pid: i32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
    // After the name in parentheses: state is the third field, utime and stime are the 14th and 15th.
    let fields = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' '));
    let used = fields.map(|fields| {
        fields
            .skip(11)
            .take(2)
            .filter_map(|n| n.parse::<i64>().ok())
            .sum::<i64>()
    });
    let seconds = used.unwrap_or_default() as f64 / ticks as f64;
    Ok(Duration::from_secs_f64(seconds))
}

/// Returns the resident RAM of the VM in a process, in bytes: QEMU's memfd, or the whole process if it has none.
pub(crate) fn guest_ram(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut of_ram = false;
    let mut sum = 0;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if of_ram => {
                let kib: u64 = words
                    .next()
                    .and_then(|n| n.parse().ok())
                    .unwrap_or_default();
                sum += kib << 10;
            }
            // The head of a mapping: address range, …, path.
            Some(first) if !first.ends_with(':') => of_ram = line.contains("memory-backend-memfd"),
            _ => {}
        }
    }
    match sum {
        0 => rss(pid) * 4096,
        _ => sum,
    }
}
