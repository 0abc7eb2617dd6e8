//! Files derived from the installation, kept in its cache: the kernel's ELF wrapper and the agent's root image. Made once
//! per generation of their source, and deleted when nobody has started a VM from them for a while.
//!
//! What is in them is their makers' ([`super::kernel`], [`super::entrypoint`]). Several daemons and many starts share one
//! cache without a lock: a file appears whole by a rename, each use renews its time, and only what was not used for
//! [`UNUSED`] goes. A VM that runs is not hurt even by that, since QEMU has its files open; one that starts is done with
//! their names in seconds.

use crate::vmm::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How long a file stays that no start has used. Far longer than a start takes; making it again takes 0.1 s.
const UNUSED: Duration = Duration::from_secs(3600);
/// Bytes of the digest that names a generation.
const KEY_BYTES: usize = 8;
/// In the names of files that are being made.
const DRAFT: &str = "new-";

/// `<kind>-<generation of source>.<ending>` in `cache`, made by `make` under the name it is given if it is not there.
/// Then deletes old generations.
///
/// # Errors
/// Those of `make`, which leaves nothing, and of the cache.
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
        let made = make(&draft).and_then(|()| {
            fs::rename(&draft, &path).step(format!("moving into place {}", path.display()))
        });
        if made.is_err() {
            drop(fs::remove_file(&draft));
        }
        made?;
    }
    prune(cache, kind, SystemTime::now());
    Ok(path)
}

/// Notes that the file is used now; false when it is not there.
fn used(path: &Path) -> bool {
    match File::open(path) {
        // On a cache that cannot be written its time is of no use to anybody either.
        Ok(file) => {
            drop(file.set_modified(SystemTime::now()));
            true
        }
        Err(_) => false,
    }
}

/// Deletes what is of this kind, a draft of a process that died included, and was not used for [`UNUSED`] before `now`. A
/// file that cannot be deleted stays for the next time: a start must not fail for it.
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
        if ours && age.is_some_and(|age| age > UNUSED) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// A short name for a file's content without reading it: which file it is, how long, and when it was written.
fn identity(path: &Path) -> BoxliteResult<String> {
    let meta = fs::metadata(path).step(format!("looking at {}", path.display()))?;
    let facts = [
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime().cast_unsigned(),
        meta.mtime_nsec().cast_unsigned(),
    ];
    let mut digest = Sha256::new();
    for fact in facts {
        digest.update(fact.to_le_bytes());
    }
    digest.update(path.as_os_str().as_encoded_bytes());
    Ok(hex::encode(&digest.finalize()[..KEY_BYTES]))
}

/// Writes a file that is not there yet.
pub(super) fn write_new(path: &Path, content: &[u8]) -> BoxliteResult<()> {
    let mut file = File::create_new(path).step(format!("creating {}", path.display()))?;
    file.write_all(content)
        .step(format!("writing {}", path.display()))
}

/// Writes a file so that others see all of it or nothing; two writers at once are harmless.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> BoxliteResult<()> {
    let draft = draft_name(path);
    let written = write_new(&draft, content).and_then(|()| {
        fs::rename(&draft, path).step(format!("moving into place {}", path.display()))
    });
    if written.is_err() {
        drop(fs::remove_file(&draft));
    }
    written
}

/// A name beside `path` that nobody else uses: the process id alone is 1 in every vmm child.
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
    fn old_generations_go_and_what_is_used_stays() {
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
        // Both were used just now: nothing goes.
        assert_eq!(names(&cache).len(), 5);
        let long_ago = SystemTime::now() - UNUSED - Duration::from_secs(60);
        for path in [&first, &second, &cache.join("agent-dead.new-1")] {
            let file = File::options().write(true).open(path).expect("opens");
            file.set_modified(long_ago).expect("its time");
        }
        assert_eq!(get("not made again"), second, "used again after a while");
        let left = names(&cache);
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(second.exists() && !first.exists(), "{left:?}");
        assert_eq!(std::io::read_to_string(open).expect("still there"), "1");
    }

    #[test]
    fn what_could_not_be_made_leaves_nothing() {
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
