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

fn read() -> Result<String, ShareError> {
    fs::read_to_string(TABLE).map_err(failed("read", TABLE))
}
