//! File operations of the store: atomic writes, durable renames, cleanup, disk usage.
//!
//! All functions block.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use boxlite_sys::file_lock::FileLock;

use crate::images::error::{ImageError, ImageResult};
use crate::images::types::ImageFsInfo;

/// Suffix of a partial download in `ingest`.
pub(in crate::images) const PARTIAL_SUFFIX: &str = ".partial";
/// Maximum age of partial downloads; older ones are deleted.
const MAX_PARTIAL_AGE: Duration = Duration::from_secs(3600);
/// Maximum file size for `read`, far above the size of manifests, configs and the index.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Creates `dir` and its parents with mode 0700.
pub(super) fn private_dir(dir: &Path) -> ImageResult<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| ImageError::io("create", dir, e))
}

/// Acquires the store's lock without waiting.
pub(super) fn lock(dir: &Path) -> ImageResult<FileLock> {
    let path = dir.join("lock");
    FileLock::try_acquire(&path)
        .map_err(|e| ImageError::io("lock", &path, e))?
        .ok_or_else(|| ImageError::Config {
            path,
            reason: "another process uses this image store".into(),
        })
}

/// Returns the file's content, `None` if it does not exist.
pub(super) fn read(path: &Path) -> ImageResult<Option<Vec<u8>>> {
    let failed = |e| ImageError::io("read", path, e);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(Some(bytes))
}

/// Atomically and durably replaces `path` by `bytes`, with mode 0600.
pub(super) fn write_atomic(path: &Path, bytes: &[u8]) -> ImageResult<()> {
    let failed = |e| ImageError::io("write", path, e);
    let dir = path.parent().unwrap_or(Path::new("/"));
    // tempfile creates the file with 0600 and deletes it unless it is persisted.
    let mut file = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(dir)
        .map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    sync_dir(dir)
}

/// Makes renames in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> ImageResult<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(|e| ImageError::io("sync", dir, e))
}

/// Deletes the file if it exists.
pub(in crate::images) fn delete(path: &Path) -> ImageResult<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ImageError::io("delete", path, e)),
        _ => Ok(()),
    }
}

/// Deletes the files of `dir` whose names `keep` rejects.
pub(super) fn retain(dir: &Path, keep: impl Fn(&str) -> bool) -> ImageResult<()> {
    for entry in fs::read_dir(dir).map_err(|e| ImageError::io("read", dir, e))? {
        let entry = entry.map_err(|e| ImageError::io("read", dir, e))?;
        if !entry.file_name().to_str().is_some_and(&keep) {
            delete(&entry.path())?;
        }
    }
    Ok(())
}

/// Deletes everything in `ingest` except recent partial downloads, which the next pull resumes.
pub(super) fn clean_ingest(dir: &Path) -> ImageResult<()> {
    let now = SystemTime::now();
    retain(dir, |name| {
        let age = fs::metadata(dir.join(name))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|t| now.duration_since(t).ok());
        name.ends_with(PARTIAL_SUFFIX) && age.is_none_or(|age| age < MAX_PARTIAL_AGE)
    })
}

/// Deletes idle partial downloads, oldest first: those above the maximum age, and as many as exceed `max_bytes` in total.
pub(super) fn reclaim_partials(
    dir: &Path,
    max_bytes: u64,
    in_use: impl Fn(&str) -> bool,
) -> ImageResult<()> {
    let mut idle = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| ImageError::io("read", dir, e))? {
        let entry = entry.map_err(|e| ImageError::io("read", dir, e))?;
        let name = entry.file_name();
        let partial = name
            .to_str()
            .is_some_and(|name| name.ends_with(PARTIAL_SUFFIX) && !in_use(name));
        if partial && let Ok(meta) = entry.metadata() {
            let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            idle.push((modified, meta.blocks() * 512, entry.path()));
        }
    }
    idle.sort();
    let mut total: u64 = idle.iter().map(|(_, bytes, _)| bytes).sum();
    for (modified, bytes, path) in idle {
        let old = modified.elapsed().is_ok_and(|age| age >= MAX_PARTIAL_AGE);
        if total > max_bytes || old {
            delete(&path)?;
            total -= bytes;
        }
    }
    Ok(())
}

/// Counts bytes and inodes below `dir`, ignoring files that vanish meanwhile.
pub(super) fn usage(dir: &Path) -> ImageResult<ImageFsInfo> {
    let mut info = ImageFsInfo {
        path: dir.to_path_buf(),
        used_bytes: 0,
        inodes_used: 0,
        timestamp_ns: 0,
    };
    let mut pending = vec![dir.to_path_buf()];
    while let Some(path) = pending.pop() {
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(ImageError::io("read", &path, e)),
        };
        info.inodes_used += 1;
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() {
                pending.push(entry.path());
            } else {
                info.inodes_used += 1;
                // st_blocks counts units of 512 bytes on every file system.
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
