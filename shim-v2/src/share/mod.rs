//! [`PodShare`]: the directory served to the VM by virtiofs, and the mounts in it.
//!
//! A tmpfs of mount points in the shim's own mount namespace: mounts of a pod are not visible on the host and end with the
//! shim. The mount is shared, so later mounts also appear in the jail of the VMM, whose namespace is a slave of this one.
//! Layers and volumes are chosen by the container module.
//!
//! The guest can write to this tmpfs through virtiofs unless the jail's view of it is read-only. Every path is therefore
//! resolved below the share without following links. All calls block; keep them off the async runtime.

mod beneath;
pub mod file_server;
pub mod host_namespace;
pub mod idmap;
mod long_overlay;
pub mod mirror;
pub mod mountinfo;
pub mod writers;

use beneath::SharePath;
use boxlite_sys::detached_mount::attach;
use boxlite_sys::mount_attributes::{
    MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, set_flags,
};
use host_namespace::HostNamespace;
use idmap::IdMap;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::{CWD, FileType, fstat};
use rustix::mount::{MoveMountFlags, move_mount};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Mount options of the tmpfs. It holds mount points only, at most one page each.
const OPTIONS: &str = "size=16m,nr_inodes=16384,mode=755";
/// Maximum length of a path below the share, in bytes.
const MAX_PATH_BYTES: usize = 512;
const NONE: Option<&str> = None;
/// Mount points are passed as links in /proc.
const FOLLOW: MoveMountFlags = MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;

/// Write access through a bind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// As the source allows.
    Full,
    /// Read-only mount; mounts below it keep their flags.
    ReadOnly,
    /// Read-only mount, including the mounts below it.
    ReadOnlyTree,
}

/// Options of a bind into the share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BindMode {
    /// Write access.
    pub access: Access,
    /// True if later mounts and unmounts of the host below the source propagate.
    pub follow_host: bool,
    /// Mapping of file owners for a user namespace.
    pub map: Option<IdMap>,
}

impl BindMode {
    /// Returns a mode without propagation.
    pub fn fixed(access: Access) -> Self {
        Self {
            access,
            follow_host: false,
            map: None,
        }
    }
}

/// Error of a change to the share.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The source cannot be read.
    #[error("failed to read host path {path}")]
    Source {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The source's mount receives no mount events of the host.
    #[error("host path {path} is on a private mount, so later mounts of the host cannot propagate")]
    Private { path: PathBuf },
    /// A file system of the source does not support ID-mapped mounts.
    #[error("failed to map the file owners of {path} for a user namespace")]
    Map {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// The path below the share is not a plain relative path.
    #[error("invalid path {path:?} in the share: {reason}")]
    InvalidPath { path: String, reason: &'static str },
    /// The path is in use.
    #[error("{path:?} already exists in the share")]
    Occupied { path: String },
    /// A system call failed.
    #[error("failed to {step} {path}")]
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

/// A pod's share. Clones refer to the same share.
#[derive(Debug, Clone)]
pub struct PodShare {
    directory: PathBuf,
    host: HostNamespace,
}

impl PodShare {
    /// Mounts an empty share at `directory`, which is created if missing. The caller must have its own mount namespace; sources
    /// of binds are resolved in `host`.
    ///
    /// # Errors
    /// The failed step.
    pub fn create(directory: &Path, host: HostNamespace) -> Result<Self, ShareError> {
        match fs::DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed("create", directory)(error));
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
        .map_err(failed("mount", directory))?;
        let share = Self {
            directory: directory.to_owned(),
            host,
        };
        let shared = mount(NONE, directory, NONE, MsFlags::MS_SHARED, NONE)
            .map_err(failed("make shared", directory));
        let made = shared.and_then(|()| share.make_stage()).and_then(|()| {
            ["b", "l", "m", "r"].iter().try_for_each(|name| {
                let path = directory.join(name);
                fs::create_dir(&path).map_err(failed("create", path))
            })
        });
        if let Err(error) = made {
            drop(share.destroy());
            return Err(error);
        }
        Ok(share)
    }

    /// Returns the directory in which binds are prepared; see [`Staged`].
    fn stage(&self) -> PathBuf {
        self.directory.with_extension("stage")
    }

    fn make_stage(&self) -> Result<(), ShareError> {
        let stage = self.stage();
        match fs::DirBuilder::new().mode(0o700).create(&stage) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(failed("create", stage)(error));
            }
            _ => {}
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let kind = Some("tmpfs");
        mount(kind, &stage, kind, flags, Some(OPTIONS)).map_err(failed("mount", &stage))?;
        mount(NONE, &stage, NONE, MsFlags::MS_PRIVATE, NONE).map_err(failed("make private", &stage))
    }

    /// Returns the namespace in which sources of binds are resolved.
    pub fn host(&self) -> &HostNamespace {
        &self.host
    }

    /// Returns the mount point of the share.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Binds `source`, a file or a directory with all mounts below it, at `path`. It is resolved in the host's mount namespace at
    /// the time of the call, following links.
    ///
    /// # Errors
    /// Source if it cannot be read, Private if propagation is requested from a private mount, Occupied if `path` is in use. The
    /// share is unchanged then.
    pub fn bind(&self, source: &Path, path: &str, mode: BindMode) -> Result<(), ShareError> {
        let missing = |error| ShareError::Source {
            path: source.to_owned(),
            source: error,
        };
        let tree = self.host.clone_tree(source).map_err(missing)?;
        let kind = FileType::from_raw_mode(fstat(&tree).map_err(|e| missing(e.into()))?.st_mode);
        if let Some(map) = mode.map {
            idmap::apply(&tree, map).map_err(|error| ShareError::Map {
                path: source.to_owned(),
                source: error,
            })?;
        }
        restrict(&tree, mode.access).map_err(failed("set mount flags of", source))?;
        let mount_point = self.create_mount_point(path, kind.is_dir())?;
        let staged = Staged::attach(&self.stage(), &tree, kind.is_dir(), source, mode);
        let done = staged.and_then(|staged| {
            // Appears in the VMM's namespace with its final flags, and is shared with it because the share is.
            mount(
                Some(&staged.0),
                &mount_point.path(),
                NONE,
                MsFlags::MS_MOVE,
                NONE,
            )
            .map_err(failed("move into the share", source))
        });
        drop(mount_point);
        if done.is_err() {
            drop(self.unbind(path));
        }
        done
    }

    /// Mounts a file system of type `kind` at the directory `path`, with fstab options.
    ///
    /// # Errors
    /// The kernel refused the mount; the share is unchanged then.
    pub fn mount(
        &self,
        kind: &str,
        source: &str,
        options: &[String],
        path: &str,
    ) -> Result<(), ShareError> {
        let mount_point = self.create_mount_point(path, true)?;
        let (flags, data) = split_options(options);
        let target = mount_point.path();
        let call = |data: &str| {
            mount(Some(source), &target, Some(kind), flags, Some(data))
                .map_err(std::io::Error::from)
        };
        let done = match long_overlay::shorten(kind, &data) {
            Some((directory, short)) => long_overlay::inside(&directory, || call(&short)),
            None => call(&data),
        }
        .map_err(failed("mount", source));
        drop(mount_point);
        if done.is_err() {
            drop(self.unbind(path));
        }
        done
    }

    /// Moves a detached mount whose root is a file to `path`.
    ///
    /// # Errors
    /// As [`PodShare::bind`]; the share is unchanged then.
    pub fn attach(&self, tree: &OwnedFd, path: &str) -> Result<(), ShareError> {
        let mount_point = self.create_mount_point(path, false)?;
        let how = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        let done = move_mount(tree, "", CWD, mount_point.path(), how | FOLLOW)
            .map_err(failed("move into the share", path));
        drop(mount_point);
        if done.is_err() {
            drop(self.unbind(path));
        }
        done
    }

    /// Removes a mount made by [`PodShare::bind`], [`PodShare::mount`] or [`PodShare::attach`] lazily: files that the guest has
    /// open remain usable. Succeeds if nothing is mounted.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn unbind(&self, path: &str) -> Result<(), ShareError> {
        check(path)?;
        let target = self.directory.join(path);
        let Some(mount_point) =
            SharePath::open(&self.directory, path).map_err(failed("open", &target))?
        else {
            return Ok(());
        };
        drop(mount_point);
        loop {
            match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => {}
                Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
                Err(errno) => return Err(failed("unmount", &target)(errno)),
            }
        }
        self.clear(path)
    }

    /// Unmounts the share and everything in it. Succeeds if it is not mounted.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn destroy(&self) -> Result<(), ShareError> {
        unmount_and_remove(&self.directory)?;
        unmount_and_remove(&self.stage())
    }

    /// Creates the mount point of a bind and its parents.
    fn create_mount_point(&self, path: &str, directory: bool) -> Result<SharePath, ShareError> {
        check(path)?;
        let target = self.directory.join(path);
        SharePath::create(&self.directory, path, directory).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => ShareError::Occupied {
                path: path.to_owned(),
            },
            _ => failed("create", target)(error),
        })
    }

    /// Removes the mount point and its empty parents, except the share's top-level directories.
    fn clear(&self, path: &str) -> Result<(), ShareError> {
        let target = self.directory.join(path);
        SharePath::remove(&self.directory, path).map_err(failed("remove", target))?;
        let mut parent = Path::new(path).parent();
        while let Some(path) = parent.filter(|path| path.components().count() > 1) {
            // Not empty: it contains another mount point.
            if SharePath::remove(&self.directory, &path.to_string_lossy()).is_err() {
                break;
            }
            parent = path.parent();
        }
        Ok(())
    }
}

fn check(path: &str) -> Result<(), ShareError> {
    let bad = |reason| {
        Err(ShareError::InvalidPath {
            path: path.chars().take(MAX_PATH_BYTES).collect(),
            reason,
        })
    };
    if path.is_empty() || path.len() > MAX_PATH_BYTES {
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

/// Unmounts one of the shim's directories and removes it.
fn unmount_and_remove(directory: &Path) -> Result<(), ShareError> {
    match umount2(directory, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(errno) => return Err(failed("unmount", directory)(errno)),
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(failed("remove", directory)(error))
        }
        _ => Ok(()),
    }
}

/// A bind under preparation, on a private mount. A bind made in the share directly would be copied into the VMM's namespace
/// at once, and propagation set later would not reach that copy.
/// Dropping it unmounts it unless it was moved away.
struct Staged(PathBuf);

impl Drop for Staged {
    fn drop(&mut self) {
        // EINVAL: it was moved.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let _ = fs::remove_dir(&self.0).or_else(|_| fs::remove_file(&self.0));
    }
}

impl Staged {
    fn attach(
        stage: &Path,
        tree: &OwnedFd,
        directory: bool,
        source: &Path,
        mode: BindMode,
    ) -> Result<Self, ShareError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = stage.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let made = match directory {
            true => fs::create_dir(&path),
            false => fs::File::create_new(&path).map(drop),
        };
        made.map_err(failed("create", &path))?;
        let staged = Self(path);
        attach(tree, &staged.0).map_err(failed("bind", source))?;
        staged.set_propagation(source, mode)?;
        Ok(staged)
    }

    fn set_propagation(&self, source: &Path, mode: BindMode) -> Result<(), ShareError> {
        let kind = match mode.follow_host {
            // No mount event passes in either direction.
            false => MsFlags::MS_PRIVATE,
            // Mount events of the host are received, none are sent.
            true => MsFlags::MS_SLAVE,
        };
        mount(NONE, &self.0, NONE, kind | MsFlags::MS_REC, NONE)
            .map_err(failed("set propagation of", source))?;
        if mode.follow_host && !mountinfo::is_slave(&self.0)? {
            return Err(ShareError::Private {
                path: source.to_owned(),
            });
        }
        Ok(())
    }
}

/// Restricts a detached tree: no part of the host needs devices or set-user-id programs of a volume, and the guest applies
/// its own mount options.
fn restrict(tree: &OwnedFd, access: Access) -> std::io::Result<()> {
    set_flags(tree, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, true)?;
    match access {
        Access::Full => Ok(()),
        Access::ReadOnly => set_flags(tree, MOUNT_ATTR_RDONLY, false),
        Access::ReadOnlyTree => set_flags(tree, MOUNT_ATTR_RDONLY, true),
    }
}

/// Splits fstab options into flags and data of the mount call.
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

/// Reports whether virtiofs can serve a host path: sockets, FIFOs and devices appear in the guest without their function.
pub fn is_plain(path: &Path) -> std::io::Result<bool> {
    let kind = fs::metadata(path)?.file_type();
    Ok(!(kind.is_socket() || kind.is_char_device() || kind.is_block_device() || kind.is_fifo()))
}

#[cfg(test)]
pub(crate) mod tests;
