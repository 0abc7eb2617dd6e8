//! Processes of a pod as the kernel shows them in /proc: the shim, what runs below it, and how much memory that is.
//!
//! Knows the product by process names and command lines only.

use crate::bail;
use crate::outcome::Result;

/// Process ids whose command line or name holds all of the words, in this PID namespace.
pub fn pids(words: &[&str]) -> Result<Vec<i32>> {
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

/// Process ids of the shim of a pod and of everything below it.
pub fn family(id: &str) -> Result<(i32, Vec<i32>)> {
    let shims = pids(&["containerd-shim", id])?;
    let parent = |pid: i32| -> Option<i32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let Some(&shim) = shims
        .iter()
        .find(|&&p| parent(p).is_none_or(|pp| !shims.contains(&pp)))
    else {
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

/// SIGKILL.
pub fn kill(pid: i32) -> Result {
    Ok(nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )?)
}

/// Resident pages; the VMM has the most.
pub fn rss(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    text.split(' ')
        .nth(1)
        .and_then(|n| n.parse().ok())
        .unwrap_or_default()
}

/// Proportional set size in KiB.
pub fn pss(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}
