//! Disk usage of a container: a walk over its writable layer, bounded in time and cached.
//!
//! ext4 project quotas would be immediate, but need a filesystem created for them; the bounded walk is sufficient for
//! statistics. A walk that reaches the limit returns a partial result.

use boxlite_sys::sync::Mutex;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Maximum duration of a walk.
const MAX_WALK_TIME: Duration = Duration::from_millis(300);
/// Lifetime of a cached result; the kubelet queries every 10 s.
const CACHE_LIFETIME: Duration = Duration::from_secs(5);

/// Disk usage of a tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Allocated blocks, in bytes.
    pub bytes: u64,
    pub inodes: u64,
}

/// Cached usage of one tree.
#[derive(Debug, Default)]
pub(crate) struct UsageCache {
    last: Mutex<Option<(Instant, Usage)>>,
}

impl UsageCache {
    /// Returns the usage of the tree at `path`. Blocks up to [`MAX_WALK_TIME`].
    pub(crate) fn get(&self, path: &Path) -> Usage {
        let mut last = self.last.lock();
        match *last {
            Some((when, usage)) if when.elapsed() < CACHE_LIFETIME => usage,
            _ => {
                let usage = walk(path, Instant::now() + MAX_WALK_TIME);
                *last = Some((Instant::now(), usage));
                usage
            }
        }
    }
}

/// Counts every inode once; symlinks are not followed.
fn walk(path: &Path, deadline: Instant) -> Usage {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut pending = vec![path.to_path_buf()];
    while let Some(directory) = pending.pop() {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for entry in entries.flatten() {
            if Instant::now() >= deadline {
                return usage;
            }
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert(metadata.ino()) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes += metadata.blocks() * 512;
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn walk_counts_hard_links_once_and_ignores_symlinks() {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("a"), vec![1; 100_000]).unwrap();
        fs::hard_link(tree.path().join("a"), tree.path().join("b")).unwrap();
        fs::create_dir(tree.path().join("d")).unwrap();
        std::os::unix::fs::symlink("/", tree.path().join("d/root")).unwrap();
        let usage = walk(tree.path(), Instant::now() + Duration::from_secs(5));
        assert_eq!(usage.inodes, 3);
        assert!((100_000..200_000).contains(&usage.bytes), "{usage:?}");
        assert_eq!(walk(tree.path(), Instant::now()), Usage::default());
    }
}
