//! Cache of files derived from the installation: the kernel's ELF wrapper and the agent's root image. Created once per
//! version of their source, deleted when no VM was started from them for some time.
//!
//! [`super::kernel`] and [`super::entrypoint`] create the contents. Several daemons and concurrent starts share a cache
//! without a lock: a file appears by rename, each use updates its modification time, and only files unused for
//! [`MAX_UNUSED_AGE`] are deleted. A running VM is unaffected because QEMU has its files open; a starting one needs the names
//! only for seconds.

use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Age at which an unused file is deleted. A start takes far less; creating the file again takes 0.1 s.
const MAX_UNUSED_AGE: Duration = Duration::from_secs(3600);
/// Length of the digest in a file name, in bytes.
const KEY_BYTES: usize = 8;
/// Marker in the names of incomplete files.
const DRAFT: &str = "new-";

/// Returns `<kind>-<version of source>.<ending>` in `cache`, created by `make` if missing, and deletes old versions.
///
/// # Errors
/// Errors of `make`, after which nothing remains, and of the cache.
pub(super) fn obtain(
    cache: &Path,
    kind: &str,
    source: &Path,
    ending: &str,
    make: impl FnOnce(&Path) -> BoxliteResult<()>,
) -> BoxliteResult<PathBuf> {
    let path = cache.join(format!("{kind}-{}.{ending}", identity(source)?));
    if !used(&path) {
        let draft = draft_name(&path);
        let made = make(&draft)
            .and_then(|()| fs::rename(&draft, &path).step(format!("rename to {}", path.display())));
        if made.is_err() {
            drop(fs::remove_file(&draft));
        }
        made?;
    }
    prune(cache, kind, SystemTime::now());
    Ok(path)
}

/// Marks the file as used; returns false if it does not exist.
fn used(path: &Path) -> bool {
    match File::open(path) {
        // In a read-only cache the time does not matter, because nothing is deleted.
        Ok(file) => {
            drop(file.set_modified(SystemTime::now()));
            true
        }
        Err(_) => false,
    }
}

/// Deletes files of this kind, including drafts of dead processes, that were not used for [`MAX_UNUSED_AGE`] before `now`. A
/// failed deletion is retried by the next start.
fn prune(cache: &Path, kind: &str, now: SystemTime) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let ours = entry
            .file_name()
            .to_str()
            .and_then(|name| name.strip_prefix(kind))
            .is_some_and(|rest| rest.starts_with('-'));
        let age = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|used| now.duration_since(used).ok());
        if ours && age.is_some_and(|age| age > MAX_UNUSED_AGE) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// Returns a short identifier of a file's version from its metadata, without reading it.
fn identity(path: &Path) -> BoxliteResult<String> {
    let meta = fs::metadata(path).step(format!("stat {}", path.display()))?;
    let fields = [
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime().cast_unsigned(),
        meta.mtime_nsec().cast_unsigned(),
    ];
    let mut digest = Sha256::new();
    for field in fields {
        digest.update(field.to_le_bytes());
    }
    digest.update(path.as_os_str().as_encoded_bytes());
    Ok(hex::encode(&digest.finalize()[..KEY_BYTES]))
}

/// Writes a file that does not exist yet.
pub(super) fn write_new(path: &Path, content: &[u8]) -> BoxliteResult<()> {
    let mut file = File::create_new(path).step(format!("create {}", path.display()))?;
    file.write_all(content)
        .step(format!("write {}", path.display()))
}

/// Replaces a file atomically; concurrent writers are harmless.
pub(super) fn write_atomically(path: &Path, content: &[u8]) -> BoxliteResult<()> {
    let draft = draft_name(path);
    let written = write_new(&draft, content)
        .and_then(|()| fs::rename(&draft, path).step(format!("rename to {}", path.display())));
    if written.is_err() {
        drop(fs::remove_file(&draft));
    }
    written
}

/// Returns a unique name beside `path`. The process id does not suffice: it is 1 in every vmm child.
fn draft_name(path: &Path) -> PathBuf {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    path.with_extension(format!("{DRAFT}{:x}", now.map_or(0, |now| now.as_nanos())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(cache: &Path) -> Vec<String> {
        let entries = fs::read_dir(cache).expect("cache");
        let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("entry").file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn obtain_deletes_old_versions_and_keeps_used_files() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (cache, source) = (dir.path().join("cache"), dir.path().join("agent"));
        fs::create_dir(&cache).expect("cache");
        let get = |content: &str| {
            obtain(&cache, "agent", &source, "erofs", |draft| {
                write_new(draft, content.as_bytes())
            })
            .expect("made")
        };
        fs::write(&source, "one").expect("source");
        let first = get("1");
        assert_eq!(get("not made again"), first);
        assert_eq!(fs::read_to_string(&first).expect("readable"), "1");
        fs::write(&source, "another").expect("source");
        let second = get("2");
        let open = File::open(&first).expect("a VM has it open");
        for name in ["agent-dead.new-1", "kernel-x.elf", "tsc_khz"] {
            fs::write(cache.join(name), "x").expect("writable");
        }
        // Both were just used, so nothing is deleted.
        assert_eq!(names(&cache).len(), 5);
        let long_ago = SystemTime::now() - MAX_UNUSED_AGE - Duration::from_secs(60);
        for path in [&first, &second, &cache.join("agent-dead.new-1")] {
            let file = File::options().write(true).open(path).expect("opens");
            file.set_modified(long_ago).expect("its time");
        }
        assert_eq!(get("not made again"), second, "used again after a while");
        let remaining = names(&cache);
        assert_eq!(remaining.len(), 3, "{remaining:?}");
        assert!(second.exists() && !first.exists(), "{remaining:?}");
        assert_eq!(std::io::read_to_string(open).expect("still there"), "1");
    }

    #[test]
    fn obtain_failed_make_leaves_nothing() {
        let dir = tempfile::tempdir().expect("tempdir");
        let source = dir.path().join("source");
        fs::write(&source, "x").expect("source");
        let cache = dir.path().join("cache");
        fs::create_dir(&cache).expect("cache");
        let made = obtain(&cache, "agent", &source, "erofs", |draft| {
            write_new(draft, b"half")?;
            write_new(&draft.join("below a file"), b"")
        });
        assert!(made.is_err());
        assert_eq!(names(&cache), Vec::<String>::new());
    }
}
