//! Inspects the processes of a cgroup: their number, open descriptors, and the limit of these.
//!
//! A container may have any number of processes and descriptors, so the inspection is bounded in time and number;
//! beyond the bound the result is partial. Blocks; called through `spawn_blocking` by `Container.Stats` on request.

use super::Cgroup;
use boxlite_proto::boxlite::v1::ProcessStats;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Maximum duration of an inspection, a part of the 2 s that a scrape allows per VM.
const MAX_INSPECT_TIME: Duration = Duration::from_millis(200);
/// Maximum number of descriptors inspected.
const MAX_DESCRIPTORS: u64 = 65_536;

/// Returns statistics of the processes in `cgroup`; the open-files limit is that of the process `init`.
pub(crate) fn inspect(cgroup: &Cgroup, init: i32) -> ProcessStats {
    let processes = cgroup.processes();
    let deadline = Instant::now() + MAX_INSPECT_TIME;
    let mut stats = ProcessStats {
        processes: processes.len() as u64,
        max_open_files: max_open_files(init),
        ..ProcessStats::default()
    };
    for pid in processes {
        let more = count(Path::new(&format!("/proc/{pid}/fd")), deadline, &mut stats);
        if !more {
            break;
        }
    }
    stats
}

/// Counts the entries of one `fd` directory; false if the bound is reached. A process that has ended has none.
fn count(directory: &Path, deadline: Instant, stats: &mut ProcessStats) -> bool {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if stats.file_descriptors >= MAX_DESCRIPTORS || Instant::now() >= deadline {
            return false;
        }
        stats.file_descriptors += 1;
        let target = fs::read_link(entry.path());
        if target.is_ok_and(|target| target.to_string_lossy().starts_with("socket:")) {
            stats.sockets += 1;
        }
    }
    true
}

fn max_open_files(pid: i32) -> u64 {
    fs::read_to_string(format!("/proc/{pid}/limits"))
        .ok()
        .and_then(|text| soft_open_files(&text))
        .unwrap_or(0)
}

/// Parses the soft limit of `Max open files   1024   4096   files`; `None` if it is `unlimited`.
fn soft_open_files(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn count_counts_descriptors_and_sockets() {
        let (_one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut stats = ProcessStats::default();
        let deadline = Instant::now() + Duration::from_secs(5);
        assert!(count(Path::new("/proc/self/fd"), deadline, &mut stats));
        assert!(stats.sockets >= 2 && stats.file_descriptors > stats.sockets);
        assert!(!count(
            Path::new("/proc/self/fd"),
            Instant::now(),
            &mut ProcessStats::default()
        ));
    }

    #[test]
    fn soft_open_files_parses_the_limit() {
        let text = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 4096                 files     \n";
        assert_eq!(soft_open_files(text), Some(1024));
        assert_eq!(
            soft_open_files("Max open files  unlimited  unlimited  files\n"),
            None
        );
        assert_eq!(soft_open_files(""), None);
        assert!(max_open_files(std::process::id().cast_signed()) > 0);
    }
}
