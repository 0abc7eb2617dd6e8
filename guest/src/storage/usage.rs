//! How much a container has written: a walk over its writable layer, bounded in time and kept for a while.
//!
//! ext4 project quotas would answer at once, but need a file system made for them; the bound makes the walk good enough
//! for statistics. A walk that hits the bound answers what it saw.

use boxlite_sys::sync::Mutex;
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest walk.
const WALK_LIMIT: Duration = Duration::from_millis(300);
/// How long an answer is good: the kubelet asks every 10 s.
const FRESH: Duration = Duration::from_secs(5);

/// What a tree takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blocks on the disk, in bytes.
    pub bytes: u64,
    pub inodes: u64,
}

/// The last answer for one tree.
#[derive(Debug, Default)]
pub struct UsageCache {
    last: Mutex<Option<(Instant, Usage)>>,
}

impl UsageCache {
    /// What the tree at `path` takes. Blocks up to [`WALK_LIMIT`].
    pub fn get(&self, path: &Path) -> Usage {
        let mut last = self.last.lock();
        match *last {
            Some((when, usage)) if when.elapsed() < FRESH => usage,
            _ => {
                let usage = walk(path, Instant::now() + WALK_LIMIT);
                *last = Some((Instant::now(), usage));
                usage
            }
        }
    }
}

/// Counts every inode once and follows no links.
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
    fn hard_links_count_once_and_links_are_not_followed() {
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
