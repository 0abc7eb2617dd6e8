//! The calling thread's mount table: which mounts are at or below a path, and whose events they get. Reads, changes nothing.

use super::{ShareError, failed};
use boxlite_sys::mountinfo::{mounts, unescape};
use std::fs;
use std::path::{Path, PathBuf};

const TABLE: &str = "/proc/thread-self/mountinfo";

/// Mount points at or below `path`, upper ones first.
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

/// Whether something is mounted below the directory `path`, itself excluded.
///
/// # Errors
/// The table cannot be read.
pub fn has_mounts_below(path: &Path) -> Result<bool, ShareError> {
    Ok(points(path)?.iter().any(|point| point != path))
}

/// Whether the mount at exactly this mount point is a slave: it gets the events of another one.
///
/// # Errors
/// The table cannot be read.
pub(super) fn is_slave(point: &Path) -> Result<bool, ShareError> {
    let table = read()?;
    // The last one covers those before it.
    let last = mounts(&table).rfind(|mount| mount.point == point);
    Ok(last.is_some_and(|mount| mount.is_slave()))
}

/// What is mounted at exactly this mount point: a device, or the file of a file-backed mount. None: nothing.
///
/// # Errors
/// The table cannot be read.
pub fn source(point: &Path) -> Result<Option<PathBuf>, ShareError> {
    let table = read()?;
    // The last one covers those before it.
    let last = mounts(&table).rfind(|mount| mount.point == point);
    Ok(last.map(|mount| unescape(mount.source)))
}

fn read() -> Result<String, ShareError> {
    fs::read_to_string(TABLE).map_err(failed("reading", TABLE))
}
