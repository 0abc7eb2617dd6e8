//! Lock files: [`FileLock`], the lock of a directory against a second process, and [`open_for_ranges`], for locks on single bytes.
//!
//! Creates the files and never deletes them. The meaning of a lock is its user's.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// An exclusive `flock(2)` on a file. Released on drop, or by the kernel at the end of the process.
///
/// The drop unlocks explicitly: a program that another thread is starting holds copies of all descriptors until its `execve`,
/// and a lock that is only closed remains locked until then.
#[derive(Debug)]
pub struct FileLock(File);

impl FileLock {
    /// Opens or creates the file (0600) and locks it without waiting. Returns `None` if it is locked already.
    ///
    /// # Errors
    /// Those of `open(2)` and `flock(2)`.
    pub fn try_acquire(path: &Path) -> io::Result<Option<Self>> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing the file, which follows, is the fallback.
        let _ = self.0.unlock();
    }
}

/// Opens or creates a file (0600) of which processes lock ranges with `fcntl(2)`, with its directories (0700).
///
/// # Errors
/// Those of `mkdir(2)` and `open(2)`.
pub fn open_for_ranges(path: &Path) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)?;
    }
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_lock_is_refused_until_the_first_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = FileLock::try_acquire(&path).unwrap().unwrap();
        assert!(FileLock::try_acquire(&path).unwrap().is_none());
        drop(first);
        assert!(FileLock::try_acquire(&path).unwrap().is_some());
    }

    #[test]
    fn drop_unlocks_while_a_child_holds_the_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = FileLock::try_acquire(&path).unwrap().unwrap();
        // A child has the same open file description between fork and exec.
        let _inherited = first.0.try_clone().unwrap();
        drop(first);
        assert!(FileLock::try_acquire(&path).unwrap().is_some());
    }
}
