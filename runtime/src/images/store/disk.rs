//! The file operations of the store: atomic writes, durable renames, cleaning up, counting.
//!
//! Knows no images. Everything blocks, so callers are on blocking threads.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::images::error::{ImageError, ImageResult};
use crate::images::types::ImageFsInfo;

/// Ending of a partial download in `ingest`.
pub(in crate::images) const PARTIAL: &str = ".partial";
/// Partial downloads older than that are deleted at start: whoever wanted them has given up or moved on.
const PARTIAL_AGE: Duration = Duration::from_secs(24 * 3600);
/// Largest file `read` takes, in bytes: manifests, configs and the index stay far below.
const MAX_READ: u64 = 256 << 20;

/// Creates `dir` and its parents with mode 0700.
pub(super) fn private_dir(dir: &Path) -> ImageResult<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| ImageError::io("creating", dir, e))
}

/// Takes the store's lock without waiting.
pub(super) fn lock(dir: &Path) -> ImageResult<File> {
    let path = dir.join("lock");
    let failed = |e| ImageError::io("locking", &path, e);
    let file = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(ImageError::Config {
            path,
            reason: "another process has this image store open".into(),
        }),
        Err(fs::TryLockError::Error(e)) => Err(failed(e)),
    }
}

/// The file's content, None if it isn't there.
pub(super) fn read(path: &Path) -> ImageResult<Option<Vec<u8>>> {
    let failed = |e| ImageError::io("reading", path, e);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_READ)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(Some(bytes))
}

/// Replaces `path` by `bytes`, mode 0600, in one step that survives a power cut.
pub(super) fn write_atomic(path: &Path, bytes: &[u8]) -> ImageResult<()> {
    let failed = |e| ImageError::io("writing", path, e);
    let dir = path.parent().unwrap_or(Path::new("/"));
    // tempfile creates with 0600, and deletes on every way out but persist.
    let mut file = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(dir)
        .map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    sync_dir(dir)
}

/// Makes renames in `dir` last.
pub(super) fn sync_dir(dir: &Path) -> ImageResult<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| ImageError::io("syncing", dir, e))
}

/// Deletes the file, which may be gone.
pub(in crate::images) fn delete(path: &Path) -> ImageResult<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ImageError::io("deleting", path, e)),
        _ => Ok(()),
    }
}

/// Deletes the files of `dir` whose names `keep` doesn't want.
pub(super) fn retain(dir: &Path, keep: impl Fn(&str) -> bool) -> ImageResult<()> {
    for entry in fs::read_dir(dir).map_err(|e| ImageError::io("reading", dir, e))? {
        let entry = entry.map_err(|e| ImageError::io("reading", dir, e))?;
        if !entry.file_name().to_str().is_some_and(&keep) {
            delete(&entry.path())?;
        }
    }
    Ok(())
}

/// Deletes what a crash left in `ingest`: everything but recent partial downloads, which the next pull continues.
pub(super) fn clean_ingest(dir: &Path) -> ImageResult<()> {
    let now = SystemTime::now();
    retain(dir, |name| {
        let age = fs::metadata(dir.join(name))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|t| now.duration_since(t).ok());
        name.ends_with(PARTIAL) && age.is_none_or(|age| age < PARTIAL_AGE)
    })
}

/// Counts bytes and inodes below `dir`. What vanishes meanwhile isn't counted.
pub(super) fn usage(dir: &Path) -> ImageResult<ImageFsInfo> {
    let mut info = ImageFsInfo {
        path: dir.to_path_buf(),
        used_bytes: 0,
        inodes_used: 0,
        timestamp_ns: 0,
    };
    let mut todo = vec![dir.to_path_buf()];
    while let Some(path) = todo.pop() {
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(ImageError::io("reading", &path, e)),
        };
        info.inodes_used += 1;
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                todo.push(entry.path());
            } else {
                info.inodes_used += 1;
                // 512: the unit of st_blocks, whatever the file system's block size.
                info.used_bytes += meta.blocks() * 512;
            }
        }
    }
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    info.timestamp_ns = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    Ok(info)
}
