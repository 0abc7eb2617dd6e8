//! [`PodShare`]: the directory that the VM's virtiofs share serves, and the bind mounts in it.
//!
//! A tmpfs with nothing but mount points, in the shim's own mount namespace: no mount of a pod is ever seen on the host,
//! and all of them end with the shim. The mount is shared, so what is bound later arrives in the jail of the VMM, whose
//! namespace is a slave of this one. It decides nothing about layers or volumes; the container module does.
//!
//! The guest may write into this tmpfs through virtiofs unless the jail's view of it is read-only, so every path here is
//! resolved without following links and without leaving the share. Blocking calls; keep them off the async runtime.

mod beneath;
pub mod idmap;
mod long_overlay;
pub mod mountinfo;

use beneath::Place;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The tmpfs holds mount points only: a page each at most.
const OPTIONS: &str = "size=16m,nr_inodes=16384,mode=755";
/// Longest path below the share, in bytes.
const PATH_LIMIT: usize = 512;
const NONE: Option<&str> = None;
/// A place is named by a link in /proc.
const FOLLOW: MoveMountFlags = MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;

/// What may be written through a bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// All that the source lets.
    Full,
    /// Not the mount itself; the mounts below it stay as they are.
    ReadOnly,
    /// Neither the mount nor any below it.
    ReadOnlyTree,
}

/// How a source appears in the share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BindMode {
    /// What may be written.
    pub access: Access,
    /// Mounts that the host makes below the source later appear too, and go when the host takes them away.
    pub follow_host: bool,
}

impl BindMode {
    /// As it is now, with this access.
    pub fn fixed(access: Access) -> Self {
        Self {
            access,
            follow_host: false,
        }
    }
}

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
    /// The source's mount gets no events of the host.
    #[error("host path {path} is on a private mount, so later mounts of the host cannot appear")]
    Private { path: PathBuf },
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
        let made = shared.and_then(|()| share.make_stage()).and_then(|()| {
            ["b", "l", "m", "r"].iter().try_for_each(|name| {
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

    /// Where binds are prepared: see [`Staged`].
    fn stage(&self) -> PathBuf {
        self.directory.with_extension("stage")
    }

    fn make_stage(&self) -> Result<(), ShareError> {
        let stage = self.stage();
        match fs::DirBuilder::new().mode(0o700).create(&stage) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed("creating", stage)(error));
            }
            _ => {}
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let kind = Some("tmpfs");
        mount(kind, &stage, kind, flags, Some(OPTIONS)).map_err(failed("mounting", &stage))?;
        mount(NONE, &stage, NONE, MsFlags::MS_PRIVATE, NONE).map_err(failed("separating", &stage))
    }

    /// Where it is mounted.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes `source` (a file or a directory with all mounts below it) appear at `path`. Links in `source` are followed.
    ///
    /// # Errors
    /// Source when it is not there, Private when later mounts are wanted and none can come, Occupied when something is at
    /// `path`; nothing is left behind then.
    pub fn bind(&self, source: &Path, path: &str, mode: BindMode) -> Result<(), ShareError> {
        let missing = |error| ShareError::Source {
            path: source.to_owned(),
            source: error,
        };
        let metadata = fs::metadata(source).map_err(missing)?;
        let place = self.make(path, metadata.is_dir())?;
        let staged = Staged::bind(&self.stage(), source, metadata.is_dir(), mode);
        let done = staged.and_then(|staged| {
            // Arrives in the VMM's namespace as it is now, and is shared with it, since the share is.
            mount(Some(&staged.0), &place.path(), NONE, MsFlags::MS_MOVE, NONE)
                .map_err(failed("moving into the share", source))
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
        let target = place.path();
        let call = |data: &str| {
            mount(Some(source), &target, Some(kind), flags, Some(data))
                .map_err(std::io::Error::from)
        };
        let done = match long_overlay::shorten(kind, &data) {
            Some((directory, short)) => long_overlay::inside(&directory, || call(&short)),
            None => call(&data),
        }
        .map_err(failed("mounting", source));
        drop(place);
        if done.is_err() {
            drop(self.unbind(path));
        }
        done
    }

    /// Mounts a file system that is one file and has no place yet.
    ///
    /// # Errors
    /// As [`PodShare::bind`]; nothing is left behind then.
    pub fn attach(&self, tree: &OwnedFd, path: &str) -> Result<(), ShareError> {
        let place = self.make(path, false)?;
        let how = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        let done = move_mount(tree, "", CWD, place.path(), how | FOLLOW)
            .map_err(failed("moving into the share", path));
        drop(place);
        if done.is_err() {
            drop(self.unbind(path));
        }
        done
    }

    /// Takes away what [`PodShare::bind`], [`PodShare::mount`] or [`PodShare::attach`] made, lazily: a guest that still has a file open keeps
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
        take_away(&self.directory)?;
        take_away(&self.stage())
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

/// Unmounts a directory of the shim's own and removes it.
fn take_away(directory: &Path) -> Result<(), ShareError> {
    match umount2(directory, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(errno) => return Err(failed("unmounting", directory)(errno)),
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(failed("removing", directory)(error))
        }
        _ => Ok(()),
    }
}

/// A bind that is being prepared, on a mount that propagates nowhere. In the share the VMM's namespace has its own copy from
/// the first moment, and flags and propagation that are set later do not reach that copy: it would stay writable.
/// What was not moved away goes when this is dropped.
struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // EINVAL: it has been moved.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let _ = fs::remove_dir(&self.0).or_else(|_| fs::remove_file(&self.0));
    }
}

impl Staged {
    fn bind(
        stage: &Path,
        source: &Path,
        directory: bool,
        mode: BindMode,
    ) -> Result<Self, ShareError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = stage.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let made = match directory {
            true => fs::create_dir(&path),
            false => fs::File::create_new(&path).map(drop),
        };
        made.map_err(failed("creating", &path))?;
        let staged = Self(path);
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(source), &staged.0, NONE, flags, NONE).map_err(failed("binding", source))?;
        staged.set_up(source, mode)?;
        Ok(staged)
    }

    /// Propagation and flags.
    fn set_up(&self, source: &Path, mode: BindMode) -> Result<(), ShareError> {
        let kind = match mode.follow_host {
            // Its own from now on: no event of the host's mounts reaches into the pod, none of the pod's the host.
            false => MsFlags::MS_PRIVATE,
            // Events come, none go.
            true => MsFlags::MS_SLAVE,
        };
        mount(NONE, &self.0, NONE, kind | MsFlags::MS_REC, NONE)
            .map_err(failed("separating", source))?;
        if mode.follow_host && !mountinfo::is_slave(&self.0)? {
            return Err(ShareError::Private {
                path: source.to_owned(),
            });
        }
        match mode.access {
            Access::Full => Ok(()),
            Access::ReadOnly => make_read_only(&self.0),
            Access::ReadOnlyTree => mountinfo::points(&self.0)?
                .iter()
                .try_for_each(|point| make_read_only(point)),
        }
    }
}

/// Makes one mount read-only.
fn make_read_only(point: &Path) -> Result<(), ShareError> {
    // Flags of the source must be repeated, or the kernel takes them off.
    let flags = nix::sys::statvfs::statvfs(point)
        .map_err(failed("looking at", point))?
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
    mount(NONE, point, NONE, keep, NONE).map_err(failed("making read-only", point))
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
pub(crate) mod tests;
