//! Queries of the calling thread's mount table: mounts at or below a path, their sources and propagation.

use super::{ShareError, failed};
use boxlite_sys::mountinfo::{mounts, unescape};
use std::fs;
use std::path::{Path, PathBuf};

const TABLE: &str = "/proc/thread-self/mountinfo";

/// Returns the mount points at or below `path`, parents first.
///
/// # Errors
/// The table cannot be read.
pub fn points(path: &Path) -> Result<Vec<PathBuf>, ShareError> {
    let mut points: Vec<PathBuf> = mounts(&read()?)
        .map(|mount| mount.point)
        .filter(|point| point.starts_with(path))
        .collect();
    points.sort();
    points.dedup();
    Ok(points)
}

/// Reports whether anything is mounted below the directory `path`, itself excluded.
///
/// # Errors
/// The table cannot be read.
pub fn has_mounts_below(path: &Path) -> Result<bool, ShareError> {
    Ok(points(path)?.iter().any(|point| point != path))
}

/// Reports whether the mount at exactly this mount point is a slave, that is, receives mount events.
///
/// # Errors
/// The table cannot be read.
pub(super) fn is_slave(point: &Path) -> Result<bool, ShareError> {
    let table = read()?;
    // The topmost mount comes last.
    let last = mounts(&table).rfind(|mount| mount.point == point);
    Ok(last.is_some_and(|mount| mount.is_slave()))
}

/// Returns the device or backing file mounted at exactly this mount point; None if nothing is mounted there.
///
/// # Errors
/// The table cannot be read.
pub fn source(point: &Path) -> Result<Option<PathBuf>, ShareError> {
    let table = read()?;
    // The topmost mount comes last.
    let last = mounts(&table).rfind(|mount| mount.point == point);
    Ok(last.map(|mount| unescape(mount.source)))
}

/// Returns the flags ro, noexec, nosuid and nodev of the mount that contains `path`.
///
/// # Errors
/// The table cannot be read.
pub fn flags(path: &Path) -> Result<Vec<String>, ShareError> {
    Ok(flags_in(&read()?, path))
}

fn flags_in(table: &str, path: &Path) -> Vec<String> {
    // Of mounts at the same point the last is on top.
    let mount = mounts(table)
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.components().count());
    let options = mount.map_or("", |mount| mount.options).split(',');
    let kept = options.filter(|option| matches!(*option, "ro" | "noexec" | "nosuid" | "nodev"));
    kept.map(str::to_owned).collect()
}

fn read() -> Result<String, ShareError> {
    fs::read_to_string(TABLE).map_err(failed("read", TABLE))
}

#[cfg(test)]
mod tests {
    use super::flags_in;
    use std::path::Path;

    #[test]
    fn flags_are_those_of_the_innermost_topmost_mount() {
        let table = "1 0 0:1 / / rw,relatime - ext4 d rw\n2 1 0:2 / /data rw,nosuid,nodev,noexec - ext4 d rw\n\
            3 2 0:3 / /data/deep rw - ext4 d rw\n4 2 0:4 / /data/deep ro - ext4 d rw\n";
        let flags = |path: &str| flags_in(table, Path::new(path)).join(",");
        assert_eq!(flags("/srv"), "");
        assert_eq!(flags("/data/file"), "nosuid,nodev,noexec");
        assert_eq!(flags("/data/deep/x"), "ro");
        assert_eq!(flags("/database"), "");
    }
}
