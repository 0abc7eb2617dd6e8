//! [`PodShare`]: the directory that the VM's virtiofs share serves, and the bind mounts in it.
//!
//! A tmpfs with nothing but mount points, in the shim's own mount namespace: no mount of a pod is ever seen on the host,
//! and all of them end with the shim. The mount is shared, so what is bound later arrives in the jail of the VMM, whose
//! namespace is a slave of this one. It decides nothing about layers or volumes; the container module does.
//!
//! The guest may write into this tmpfs through virtiofs unless the jail's view of it is read-only, so every path here is
//! resolved without following links and without leaving the share. Blocking calls; keep them off the async runtime.

mod beneath;

use beneath::Place;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// The tmpfs holds mount points only: a page each at most.
const OPTIONS: &str = "size=16m,nr_inodes=16384,mode=755";
/// Longest path below the share, in bytes.
const PATH_LIMIT: usize = 512;
const NONE: Option<&str> = None;

/// Why something could not be put into the share or taken out of it.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The source is not there, or cannot be looked at.
    #[error("host path {path}")]
    Source {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The place in the share is no plain relative path.
    #[error("{path:?} is no place in the share: {reason}")]
    Place { path: String, reason: &'static str },
    /// Something is there already.
    #[error("{path:?} is in the share already")]
    Occupied { path: String },
    /// A system call failed.
    #[error("{step} {path}")]
    System {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
}

fn failed<E: Into<std::io::Error>>(
    step: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(E) -> ShareError {
    move |source| ShareError::System {
        step,
        path: path.into(),
        source: source.into(),
    }
}

/// See the module. Clones are the same share.
#[derive(Debug, Clone)]
pub struct PodShare {
    directory: PathBuf,
}

impl PodShare {
    /// Mounts an empty share at `directory`, which is made if it is missing. The caller's mount namespace must be its own.
    ///
    /// # Errors
    /// Names the step.
    pub fn create(directory: &Path) -> Result<Self, ShareError> {
        match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed("creating", directory)(error));
            }
            _ => {}
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(
            Some("tmpfs"),
            directory,
            Some("tmpfs"),
            flags,
            Some(OPTIONS),
        )
        .map_err(failed("mounting", directory))?;
        let share = Self {
            directory: directory.to_owned(),
        };
        let shared = mount(NONE, directory, NONE, MsFlags::MS_SHARED, NONE)
            .map_err(failed("sharing", directory));
        let made = shared.and_then(|()| {
            ["l", "m", "r"].iter().try_for_each(|name| {
                let path = directory.join(name);
                fs::create_dir(&path).map_err(failed("creating", path))
            })
        });
        if let Err(error) = made {
            drop(share.destroy());
            return Err(error);
        }
        Ok(share)
    }

    /// Where it is mounted.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes `source` (a file or a directory with all mounts below it) appear at `path`. Links in `source` are followed.
    /// Mounts that the host makes below `source` later do not appear.
    ///
    /// # Errors
    /// Source when it is not there, Occupied when something is at `path`; nothing is left behind then.
    pub fn bind(&self, source: &Path, path: &str, read_only: bool) -> Result<(), ShareError> {
        let missing = |error| ShareError::Source {
            path: source.to_owned(),
            source: error,
        };
        let metadata = fs::metadata(source).map_err(missing)?;
        let place = self.make(path, metadata.is_dir())?;
        let bound = mount(
            Some(source),
            &place.path(),
            NONE,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            NONE,
        )
        .map_err(failed("binding", source));
        let done = bound.and_then(|()| {
            let target = self.directory.join(path);
            // Its own from now on: no event of the host's mounts reaches into the pod, none of the pod's the host.
            mount(
                NONE,
                &target,
                NONE,
                MsFlags::MS_PRIVATE | MsFlags::MS_REC,
                NONE,
            )
            .map_err(failed("separating", &target))?;
            // Shared again, or what the VMM's namespace has would not follow an unmount here.
            mount(
                NONE,
                &target,
                NONE,
                MsFlags::MS_SHARED | MsFlags::MS_REC,
                NONE,
            )
            .map_err(failed("sharing", &target))?;
            if read_only {
                make_read_only(&target)
            } else {
                Ok(())
            }
        });
        drop(place);
        if done.is_err() {
            drop(self.unbind(path));
        }
        done
    }

    /// Mounts a file system of type `kind` at the directory `path`, with options as in fstab.
    ///
    /// # Errors
    /// The kernel's answer to the mount; nothing is left behind then.
    pub fn mount(
        &self,
        kind: &str,
        source: &str,
        options: &[String],
        path: &str,
    ) -> Result<(), ShareError> {
        let place = self.make(path, true)?;
        let (flags, data) = split_options(options);
        let done = mount(
            Some(source),
            &place.path(),
            Some(kind),
            flags,
            Some(data.as_str()),
        )
        .map_err(failed("mounting", source));
        drop(place);
        if done.is_err() {
            drop(self.unbind(path));
        }
        done
    }

    /// Takes away what [`PodShare::bind`] or [`PodShare::mount`] made, lazily: a guest that still has a file open keeps
    /// that file. Succeeds on what is gone.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn unbind(&self, path: &str) -> Result<(), ShareError> {
        check(path)?;
        let target = self.directory.join(path);
        let Some(place) = Place::open(&self.directory, path).map_err(failed("opening", &target))?
        else {
            return Ok(());
        };
        drop(place);
        loop {
            match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
                Err(errno) => return Err(failed("unmounting", &target)(errno)),
            }
        }
        self.clear(path)
    }

    /// Unmounts the share with all that is in it. Succeeds on what is gone.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn destroy(&self) -> Result<(), ShareError> {
        match umount2(
            &self.directory,
            MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        ) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(errno) => return Err(failed("unmounting", &self.directory)(errno)),
        }
        match fs::remove_dir(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(failed("removing", &self.directory)(error))
            }
            _ => Ok(()),
        }
    }

    /// Makes the mount point for a bind and its parents.
    fn make(&self, path: &str, directory: bool) -> Result<Place, ShareError> {
        check(path)?;
        let target = self.directory.join(path);
        Place::make(&self.directory, path, directory).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => ShareError::Occupied {
                path: path.to_owned(),
            },
            _ => failed("making", target)(error),
        })
    }

    /// Removes the mount point and then its parents as far as they are empty, but for the share's own directories.
    fn clear(&self, path: &str) -> Result<(), ShareError> {
        let target = self.directory.join(path);
        Place::remove(&self.directory, path).map_err(failed("removing", target))?;
        let mut parent = Path::new(path).parent();
        while let Some(path) = parent.filter(|path| path.components().count() > 1) {
            // Not empty: somebody else's mount point is in it.
            if Place::remove(&self.directory, &path.to_string_lossy()).is_err() {
                break;
            }
            parent = path.parent();
        }
        Ok(())
    }
}

fn check(path: &str) -> Result<(), ShareError> {
    let bad = |reason| {
        Err(ShareError::Place {
            path: path.chars().take(PATH_LIMIT).collect(),
            reason,
        })
    };
    if path.is_empty() || path.len() > PATH_LIMIT {
        return bad("empty or too long");
    }
    if path
        .split('/')
        .any(|part| part.is_empty() || part == "." || part == "..")
        || path.contains('\0')
    {
        return bad("not a plain relative path");
    }
    Ok(())
}

/// Makes a mount and every mount below it read-only.
fn make_read_only(target: &Path) -> Result<(), ShareError> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo")
        .map_err(failed("reading", "/proc/thread-self/mountinfo"))?;
    let below = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|point| point.starts_with(target));
    for point in below {
        // Flags of the source must be repeated, or the kernel takes them off.
        let flags = nix::sys::statvfs::statvfs(&point)
            .map_err(failed("looking at", &point))?
            .flags();
        let mut keep = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        for (set, flag) in [
            (nix::sys::statvfs::FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
            (nix::sys::statvfs::FsFlags::ST_NODEV, MsFlags::MS_NODEV),
            (nix::sys::statvfs::FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
            (nix::sys::statvfs::FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        ] {
            if flags.contains(set) {
                keep |= flag;
            }
        }
        mount(NONE, &point, NONE, keep, NONE).map_err(failed("making read-only", &point))?;
    }
    Ok(())
}

/// A path of mountinfo: space, tab, newline and backslash are octal there.
fn unescape(field: &str) -> PathBuf {
    let (mut bytes, raw) = (Vec::new(), field.as_bytes());
    let mut at = 0;
    while at < raw.len() {
        let octal = raw.get(at + 1..at + 4).filter(|_| raw[at] == b'\\');
        let code = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(code.unwrap_or(raw[at]));
        at += if code.is_some() { 4 } else { 1 };
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(bytes))
}

/// fstab-style options as the mount call wants them.
fn split_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "defaults" => {}
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Whether a host path can be used through virtiofs as what it is: a socket or a device there is only its name here.
pub fn is_plain(path: &Path) -> std::io::Result<bool> {
    let kind = fs::metadata(path)?.file_type();
    Ok(!(kind.is_socket() || kind.is_char_device() || kind.is_block_device() || kind.is_fifo()))
}

#[cfg(test)]
mod tests;
