//! [`replace`] and [`replace_synced`]: files of which a crash leaves the old or the new version.
//!
//! Does not create the directory and does not look at the content.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes `bytes` to `draft` (0600), and renames that to `path` in the same file system. For files that need not outlive a crash
/// of the machine. A failure, for example on a full disk, leaves the old version and no draft.
///
/// # Errors
/// Those of `open(2)`, `write(2)` and `rename(2)`.
pub fn replace(path: &Path, draft: &Path, bytes: &[u8]) -> io::Result<()> {
    finish(path, draft, write(draft, bytes).map(drop))
}

/// As [`replace`], for files that outlive a crash of the machine: the content is synced before the rename, the directory is not.
///
/// # Errors
/// Those of [`replace`] and `fsync(2)`.
pub fn replace_synced(path: &Path, draft: &Path, bytes: &[u8]) -> io::Result<()> {
    finish(
        path,
        draft,
        write(draft, bytes).and_then(|file| file.sync_all()),
    )
}

fn finish(path: &Path, draft: &Path, written: io::Result<()>) -> io::Result<()> {
    let replaced = written.and_then(|()| fs::rename(draft, path));
    if replaced.is_err() {
        // It may not exist; the next version overwrites it if it does.
        let _ = fs::remove_file(draft);
    }
    replaced
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn failure_leaves_the_old_version_and_no_draft() {
        let directory = tempfile::tempdir().unwrap();
        let [path, draft] = ["file", "draft"].map(|name| directory.path().join(name));
        replace(&path, &draft, b"old").unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        // A directory with an entry keeps the rename from succeeding.
        let occupied = directory.path().join("occupied");
        fs::create_dir_all(occupied.join("by")).unwrap();
        for replace in [replace, replace_synced] {
            assert!(replace(&occupied, &draft, b"new").is_err());
            assert!(!draft.exists());
        }
        assert_eq!(fs::read(&path).unwrap(), b"old");
        replace_synced(&path, &draft, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }
}
