//! [`SharePath`]: a path below a directory, resolved by openat2 without following links and without leaving the directory.
//!
//! It mounts nothing. [`SharePath::path`] goes through the opened descriptor, so it cannot be replaced in between.

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

const DIRECTORY_MODE: Mode = Mode::from_bits_truncate(0o755);
const FILE_MODE: Mode = Mode::from_bits_truncate(0o644);

/// Opens a directory for walks below it.
fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(AT_FDCWD, path, flags, Mode::empty())?)
}

/// An opened mount point.
pub(crate) struct SharePath(OwnedFd);

impl SharePath {
    /// Creates `path` below `base`, a directory or an empty file, and its parents.
    ///
    /// # Errors
    /// AlreadyExists, or the error of openat2, for example ELOOP for a link in the path.
    pub(crate) fn create(base: &Path, path: &str, directory: bool) -> io::Result<Self> {
        let mut parent = open_directory(base)?;
        let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
        for part in parents.split('/').filter(|part| !part.is_empty()) {
            match mkdirat(&parent, part, DIRECTORY_MODE) {
                Ok(()) | Err(nix::Error::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
            parent = step(&parent, part, OFlag::O_DIRECTORY)?;
        }
        if directory {
            mkdirat(&parent, name, DIRECTORY_MODE)?;
        } else {
            let flags = OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_WRONLY
                | OFlag::O_NOFOLLOW
                | OFlag::O_CLOEXEC;
            drop(openat(&parent, name, flags, FILE_MODE)?);
        }
        step(&parent, name, OFlag::empty()).map(Self)
    }

    /// Opens `path` below `base`; None if it does not exist.
    ///
    /// # Errors
    /// As [`SharePath::create`].
    pub(crate) fn open(base: &Path, path: &str) -> io::Result<Option<Self>> {
        let base = open_directory(base)?;
        match step(&base, path, OFlag::empty()) {
            Ok(opened) => Ok(Some(Self(opened))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the empty directory or file `path` below `base`. Succeeds if it does not exist.
    ///
    /// # Errors
    /// It is not empty, or is still a mount point.
    pub(crate) fn remove(base: &Path, path: &str) -> io::Result<()> {
        let base = open_directory(base)?;
        let (parents, name) = path.rsplit_once('/').unwrap_or((".", path));
        let parent = match step(&base, parents, OFlag::O_DIRECTORY) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        match unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir) {
            Err(nix::Error::EISDIR) => match unlinkat(&parent, name, UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(nix::Error::ENOENT) => Ok(()),
                Err(errno) => Err(errno.into()),
            },
            Ok(()) | Err(nix::Error::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Returns a path to the opened mount point for a mount call.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

fn step(base: &OwnedFd, path: &str, flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | flags)
        .resolve(
            ResolveFlag::RESOLVE_BENEATH
                | ResolveFlag::RESOLVE_NO_SYMLINKS
                | ResolveFlag::RESOLVE_NO_MAGICLINKS,
        );
    Ok(openat2(base, path, how)?)
}
