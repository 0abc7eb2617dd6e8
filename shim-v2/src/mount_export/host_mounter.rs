//! [`HostMounter`]: mounts, unmounts and sweeps the FUSE mounts of a guest in the host's mount namespace.
//!
//! The shim has a private mount namespace, so each step runs on a short-lived thread that enters the host's. The guest is
//! hostile, chooses the path and serves the files. The path is therefore resolved below the volume without following links,
//! the mount is nosuid and nodev, and no lookup goes into it once it exists.
//!
//! The mount must not be visible in the share: the VM's file server would block on an answer that the same VM has to give.
//! The host's mounts propagate into the shim's namespace and into the share, so the mount is removed from both before its
//! first request is answered. Later binds into the share do not contain it either.

use super::volumes::ExportVolume;
use crate::fuse::{FileSystem, Root, file_system, named};
use crate::share::host_namespace::HostNamespace;
use boxlite_sys::mountinfo::mounts;
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, open, openat2, statx};
use rustix::mount::{
    FsPickFlags, MoveMountFlags, UnmountFlags, fsconfig_reconfigure, fspick, move_mount, unmount,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// File system type of exported mounts in the host's mount table.
const FS_TYPE: &str = "fuse.boxlite";
/// Timeout of one step: a path may lead through a file system of the host that does not respond.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// Handles on the host's mount namespace and on the shim's own.
#[derive(Debug, Clone)]
pub struct HostMounts {
    /// The host's namespace.
    pub host: HostNamespace,
    /// The shim's namespace.
    pub own: HostNamespace,
}

/// Mounts, unmounts and sweeps exported mounts. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HostMounter {
    mounts: Arc<HostMounts>,
    /// Mount point of the share in the shim's namespace.
    share: PathBuf,
    /// Source of the mounts in the host's mount table; identifies the sandbox.
    name: String,
}

/// Source and target of one exported mount.
#[derive(Debug, Clone)]
pub struct ExportRequest {
    /// Volume on the host.
    pub volume: ExportVolume,
    /// Path of the volume below the share.
    pub share_path: String,
    /// Path of the mount below the volume.
    pub path: String,
    /// True if the guest's mount is read-only.
    pub read_only: bool,
}

/// An exported mount. Dropping it leaves a dead mount behind.
#[derive(Debug)]
pub struct HostMount {
    /// FUSE device of the mount; closing the last descriptor ends the file system.
    pub device: Arc<OwnedFd>,
    /// Descriptor of the mount itself, independent of its path.
    pub mount: Arc<OwnedFd>,
}

/// Returns the mount source that identifies a sandbox.
pub fn name(sandbox: &str) -> String {
    format!("boxlite:{sandbox}")
}

impl HostMounter {
    /// Creates the mounter of one sandbox.
    pub fn new(mounts: Arc<HostMounts>, share: &Path, sandbox: &str) -> Self {
        Self {
            mounts,
            share: share.to_owned(),
            name: name(sandbox),
        }
    }

    /// Mounts an export. If the future is dropped, the thread undoes its mount.
    ///
    /// # Errors
    /// The failed step, or TimedOut; no mount remains.
    pub async fn mount(&self, request: ExportRequest) -> io::Result<HostMount> {
        let mounter = self.clone();
        self.run(
            "mount",
            move || mounter.mount_on_host(&request),
            Self::detach,
        )
        .await
    }

    /// Unmounts an export; its users get errors.
    ///
    /// # Errors
    /// The kernel's error, or TimedOut.
    pub async fn unmount(&self, mounted: HostMount) -> io::Result<()> {
        let mounter = self.clone();
        let work = move || {
            mounter.detach(mounted);
            Ok(())
        };
        self.run("unmount", work, |_, ()| {}).await
    }

    /// Unmounts everything that remains of this sandbox.
    ///
    /// # Errors
    /// TimedOut.
    pub async fn sweep(&self) -> io::Result<()> {
        let mounter = self.clone();
        let work = move || {
            mounter.mounts.host.enter()?;
            sweep(&mounter.name);
            Ok(())
        };
        self.run("sweep", work, |_, ()| {}).await
    }

    /// Runs a step on a new thread; `undo` receives a result that arrives after the timeout.
    async fn run<T: Send + 'static>(
        &self,
        step: &'static str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
        undo: impl FnOnce(&Self, T) + Send + 'static,
    ) -> io::Result<T> {
        let (done, result) = tokio::sync::oneshot::channel();
        let mounter = self.clone();
        // Not joined: a path on a stalled file system may block it beyond the timeout.
        std::thread::Builder::new()
            .name(format!("export {step}"))
            .spawn(move || {
                let worked = unshare(CloneFlags::CLONE_FS)
                    .map_err(io::Error::from)
                    .and_then(|()| work());
                if let Err(Ok(late)) = done.send(worked) {
                    undo(&mounter, late);
                }
            })?;
        match tokio::time::timeout(STEP_TIMEOUT, result).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(io::Error::other("mounter thread died")),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn mount_on_host(&self, request: &ExportRequest) -> io::Result<HostMount> {
        self.mounts.host.enter()?;
        let target = find(&request.volume, &request.path)?;
        let FileSystem { device, mount } =
            file_system(&self.name, Root::Directory, request.read_only)?;
        let how = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", &target, "", how).map_err(named("mount"))?;
        let mounted = HostMount {
            device: Arc::new(device),
            mount: Arc::new(mount),
        };
        let result = self
            .mounts
            .own
            .enter()
            .and_then(|()| self.hide(request, &mounted));
        match result {
            Ok(()) => Ok(mounted),
            Err(error) => {
                self.detach(mounted);
                Err(error)
            }
        }
    }

    /// Unmounts the export in the shim's namespace, first in the share, so that the VM can see it as briefly as possible.
    fn hide(&self, request: &ExportRequest, mounted: &HostMount) -> io::Result<()> {
        let own = device_number(&mounted.mount)?;
        let share = directory(&self.share)?;
        let below = Path::new(&request.share_path).join(&request.path);
        hide_at(&share, &below, own)?;
        let root = directory(Path::new("/"))?;
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
        for point in points(&table, &self.name) {
            hide_at(&root, point.strip_prefix("/").unwrap_or(&point), own)?;
        }
        Ok(())
    }

    /// Unmounts lazily by descriptor, so that no other mount at the same path is affected.
    fn detach(&self, mounted: HostMount) {
        let unmounted = self.mounts.host.enter().and_then(|()| {
            let path = format!("/proc/thread-self/fd/{}", mounted.mount.as_raw_fd());
            Ok(unmount(path, UnmountFlags::DETACH)?)
        });
        match unmounted {
            // EINVAL: already unmounted on the host.
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
                tracing::warn!(%error, "failed to unmount exported mount, it remains dead");
            }
            _ => {}
        }
    }

    /// Returns the host path of an export.
    pub fn target(request: &ExportRequest) -> PathBuf {
        request.volume.source.join(&request.path)
    }
}

fn directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// Opens the directory to mount on.
fn find(volume: &ExportVolume, path: &str) -> io::Result<OwnedFd> {
    let base = directory(&volume.source)?;
    let stat = rustix::fs::fstat(&base)?;
    if (stat.st_dev, stat.st_ino) != (volume.device, volume.inode) {
        return Err(io::Error::other(
            "volume was replaced since the container was created",
        ));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(&base, path, flags, Mode::empty(), resolve_beneath()).map_err(named("open mount point"))
}

fn resolve_beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// Returns the device number of a file without a request to its file system.
fn device_number(file: &OwnedFd) -> io::Result<(u32, u32)> {
    let how = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(file, "", how, StatxFlags::TYPE)?;
    Ok((stat.stx_dev_major, stat.stx_dev_minor))
}

/// Unmounts the file system `own` at `path` below `base`, if it is mounted there.
fn hide_at(base: &OwnedFd, path: &Path, own: (u32, u32)) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(mount_point) = openat2(base, path, flags, Mode::empty(), resolve_beneath()) else {
        return Ok(());
    };
    if device_number(&mount_point)? != own {
        return Ok(());
    }
    let path = format!("/proc/thread-self/fd/{}", mount_point.as_raw_fd());
    match unmount(path, UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(errno) => Err(named("unmount in the shim's namespace")(errno)),
    }
}

/// Makes the kernel drop unused inodes of a file system by a reconfigure that changes no option. Blocks; a guest can delay it
/// without limit if a process has written to a mapped file, until the file system ends.
///
/// # Errors
/// The kernel refused.
pub fn drop_unused_inodes(mount: &OwnedFd) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
    let context = fspick(mount, "", flags)?;
    Ok(fsconfig_reconfigure(context.as_fd())?)
}

/// Unmounts every mount of that name in the calling thread's namespace, as a killed shim leaves them. Never blocks on the
/// mounts themselves: their connections ended with the shim.
pub fn sweep(name: &str) {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    for point in points(&table, name) {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if let Err(error) = unmount(&point, flags) {
            tracing::warn!(point = %point.display(), %error, "failed to unmount dead exported mount");
        }
    }
}

/// Returns the mount points of that name, newest first.
fn points(table: &str, name: &str) -> Vec<PathBuf> {
    let own = mounts(table).rev();
    own.filter(|mount| (mount.kind, mount.source) == (FS_TYPE, name))
        .map(|mount| mount.point)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn points_returns_mounts_of_one_sandbox() {
        let table = r"
1 0 0:1 / / rw - ext4 /dev/vda rw
2 1 0:2 / /v/a\040b rw,nosuid shared:4 - fuse.boxlite boxlite:one rw
3 1 0:3 / /v/other rw - fuse.boxlite boxlite:two rw
4 2 0:4 / /v/a\040b/c rw - fuse.boxlite boxlite:one rw
5 1 0:5 / /v/d rw - fuse.sshfs boxlite:one rw";
        assert_eq!(
            points(table, &name("one")),
            [PathBuf::from("/v/a b/c"), PathBuf::from("/v/a b")]
        );
    }

    #[test]
    fn find_rejects_paths_outside_the_volume() {
        let dir = tempfile::tempdir().expect("tempdir");
        let source = dir.path().join("volume");
        std::fs::create_dir_all(source.join("a/b")).expect("directories");
        std::fs::write(source.join("file"), "x").expect("a file");
        symlink("a", source.join("link")).expect("a link");
        symlink("/etc", source.join("out")).expect("a link");
        let metadata = std::fs::metadata(&source).expect("it is there");
        let volume = ExportVolume {
            source: source.clone(),
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        assert!(find(&volume, "a/b").is_ok());
        for invalid in [
            "..", "a/../..", "/etc", "link/b", "out", "file", "missing", "",
        ] {
            assert!(find(&volume, invalid).is_err(), "{invalid:?}");
        }
        let other = ExportVolume { inode: 1, ..volume };
        assert!(find(&other, "a/b").is_err());
    }
}
