//! [`FileServerWatch`]: keeps the VM's file server below its limit of open files.
//!
//! The server holds a descriptor for each inode that the guest's kernel caches. With an ordinary limit (20,000 open files),
//! a `find` over a large volume would use it up, and then every access to any volume of the pod fails with ENFILE. Above half
//! of the limit the guest is asked to drop unused inodes, and with them the descriptors.

use boxlite_portal::GuestSession;
use boxlite_sys::report::Report;
use std::path::PathBuf;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Inodes that a guest looks up per second at most; determines how often the server is checked.
const LOOKUPS_PER_SECOND: u64 = 50_000;
/// Bounds of the interval between checks.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
const MAX_INTERVAL: Duration = Duration::from_secs(5);

/// A process that serves files to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileServer {
    /// `/proc/<pid>/fd`.
    descriptors: PathBuf,
    limit: u64,
}

impl FileServer {
    fn of(pid: i32) -> Option<Self> {
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
        Some(Self {
            descriptors: format!("/proc/{pid}/fd").into(),
            limit: open_files_limit(&limits)?,
        })
    }

    /// Returns the number of open descriptors; None if the process has exited. Linux 6.2 has the number as the directory's
    /// size; older kernels report 0, and the entries are counted.
    fn open(&self) -> Option<u64> {
        let size = std::fs::metadata(&self.descriptors).ok()?.len();
        match size {
            0 => Some(std::fs::read_dir(&self.descriptors).ok()?.count() as u64),
            count => Some(count),
        }
    }

    fn is_crowded(&self) -> bool {
        self.open().is_some_and(|count| count > self.limit / 2)
    }
}

/// Watches the file server of one VM.
#[derive(Debug)]
pub struct FileServerWatch {
    /// The VMM itself (libkrun), and its children, among them virtiofsd.
    servers: Vec<FileServer>,
    session: GuestSession,
}

impl FileServerWatch {
    /// Finds the processes of the VM with the vmm child `vmm`.
    pub fn new(vmm: i32, session: &GuestSession) -> Self {
        let children = std::fs::read_to_string(format!("/proc/{vmm}/task/{vmm}/children"));
        let children = children.unwrap_or_default();
        let children = children
            .split_ascii_whitespace()
            .filter_map(|pid| pid.parse().ok());
        Self {
            servers: std::iter::once(vmm)
                .chain(children)
                .filter_map(FileServer::of)
                .collect(),
            session: session.clone(),
        }
    }

    /// Runs until `ended`, on the shim's task tracker.
    pub async fn run(self, ended: CancellationToken) {
        let limit = self.servers.iter().map(|server| server.limit).min();
        let Some(limit) = limit else {
            return;
        };
        let interval = interval(limit);
        loop {
            tokio::select! {
                () = tokio::time::sleep(interval) => {}
                () = ended.cancelled() => return,
            }
            // Inodes with cached pages are kept by the first attempt.
            for pages in [false, true] {
                if !self.is_crowded() {
                    break;
                }
                if let Err(error) = self.session.guest().drop_caches(pages).await {
                    tracing::warn!(error = %Report(&error), "failed to drop the guest's caches");
                    break;
                }
            }
        }
    }

    fn is_crowded(&self) -> bool {
        self.servers.iter().any(FileServer::is_crowded)
    }
}

/// Returns half of the time in which a guest can use up the second half of the limit.
fn interval(limit: u64) -> Duration {
    let interval = Duration::from_millis(limit.saturating_mul(1000) / LOOKUPS_PER_SECOND / 4);
    interval.clamp(MIN_INTERVAL, MAX_INTERVAL)
}

/// Parses the soft limit of open files from `/proc/<pid>/limits`.
fn open_files_limit(limits: &str) -> Option<u64> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_counts_descriptors_and_crowded_is_above_half() {
        let mut own = FileServer::of(std::process::id().cast_signed()).expect("own limits");
        let before = own.open().expect("own descriptors");
        let files: Vec<_> = (0..50)
            .map(|_| std::fs::File::open("/dev/null").expect("opened"))
            .collect();
        let now = own.open().expect("own descriptors");
        assert!(now >= before + 25, "{before} → {now}");
        own.limit = 50;
        assert!(own.is_crowded());
        own.limit = 1 << 20;
        assert!(!own.is_crowded());
        drop(files);
    }

    #[test]
    fn open_files_limit_parses_the_soft_limit() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max processes             95992                95992                processes \n\
                    Max open files            1024                 20000                files     \n";
        assert_eq!(open_files_limit(text), Some(1024));
        assert_eq!(open_files_limit(""), None);
    }

    #[test]
    fn interval_is_short_for_small_limits() {
        assert_eq!(interval(20_000), MIN_INTERVAL);
        assert_eq!(interval(1 << 20), MAX_INTERVAL);
    }
}
