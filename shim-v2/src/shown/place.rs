//! [`Keeper`]: FUSE mounts in the host's mount namespace, for mounts of the guest; made, taken away, swept.
//!
//! The shim has a mount namespace of its own, so each step runs on a thread that enters the host's and ends. The guest
//! chose the path and its files answer, and it is hostile: the path is resolved below the volume without links, the mount
//! has neither set-uid programs nor devices, and once it is there nothing here looks into it.
//!
//! The mount must not be seen in the share: the VM's file server would wait for an answer that the VM gives. The host's
//! mounts propagate into the shim's namespace and the share, so it is taken out of both right after it is made, before its
//! first request is answered; what is bound into the share later has not got it either.

use super::volumes::Volume;
use crate::fuse::{FileSystem, Root, file_system, named};
use boxlite_sys::mountinfo::mounts;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, open, openat2, statx};
use rustix::mount::{
    FsPickFlags, MoveMountFlags, UnmountFlags, fsconfig_reconfigure, fspick, move_mount, unmount,
};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Type of the mounts in the host's table.
const KIND: &str = "fuse.boxlite";
/// How long one step may take. A path may lead through a file system of the host that does not answer.
const STEP_LIMIT: Duration = Duration::from_secs(10);

/// The host's mount namespace and the shim's own.
#[derive(Debug)]
pub struct HostMounts {
    host: File,
    own: File,
}

impl HostMounts {
    /// The namespace of the calling process.
    ///
    /// # Errors
    /// Without /proc.
    pub fn present() -> io::Result<File> {
        File::open("/proc/self/ns/mnt")
    }

    /// `host` as it was before, and that of the calling process.
    ///
    /// # Errors
    /// Without /proc.
    pub fn new(host: File) -> io::Result<Self> {
        let own = Self::present()?;
        Ok(Self { host, own })
    }
}

/// Moves the calling thread, which must not share its root with others, into a mount namespace.
fn enter(namespace: &File) -> io::Result<()> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNS)?)
}

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Keeper {
    mounts: Arc<HostMounts>,
    /// Where the share is mounted, in the shim's namespace.
    share: PathBuf,
    /// Source of the mounts in the host's table: whose they are.
    name: String,
}

/// What to mount where.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The directory of the host.
    pub volume: Volume,
    /// Where it is below the share.
    pub place: String,
    /// Below the volume.
    pub path: String,
    /// As the guest's mount.
    pub read_only: bool,
}

/// A mount that is there. Dropping it leaves the mount, dead.
#[derive(Debug)]
pub struct Mounted {
    /// Its requests come here and their answers go here; the last close of it ends the file system.
    pub device: Arc<OwnedFd>,
    /// Stands for the mount, wherever it is.
    pub mount: Arc<OwnedFd>,
}

/// Source of a sandbox's mounts.
pub fn name(sandbox: &str) -> String {
    format!("boxlite:{sandbox}")
}

impl Keeper {
    /// For one sandbox.
    pub fn new(mounts: Arc<HostMounts>, share: &Path, sandbox: &str) -> Self {
        Self {
            mounts,
            share: share.to_owned(),
            name: name(sandbox),
        }
    }

    /// Mounts. A dropped future takes away what its thread still makes.
    ///
    /// # Errors
    /// The step that the kernel refused, or TimedOut; nothing is left.
    pub async fn mount(&self, wanted: Wanted) -> io::Result<Mounted> {
        let keeper = self.clone();
        self.run("mount", move || keeper.place(&wanted), Self::take)
            .await
    }

    /// Takes a mount away; its users get errors.
    ///
    /// # Errors
    /// The kernel's, or TimedOut.
    pub async fn unmount(&self, mounted: Mounted) -> io::Result<()> {
        let keeper = self.clone();
        let work = move || {
            keeper.take(mounted);
            Ok(())
        };
        self.run("unmount", work, |_, ()| {}).await
    }

    /// Takes away what may be left of this sandbox.
    ///
    /// # Errors
    /// TimedOut.
    pub async fn sweep(&self) -> io::Result<()> {
        let keeper = self.clone();
        let work = move || {
            enter(&keeper.mounts.host)?;
            sweep(&keeper.name);
            Ok(())
        };
        self.run("sweep", work, |_, ()| {}).await
    }

    /// Runs a step on a thread of its own; `undo` gets what comes too late.
    async fn run<T: Send + 'static>(
        &self,
        step: &'static str,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
        undo: impl FnOnce(&Self, T) + Send + 'static,
    ) -> io::Result<T> {
        let (done, result) = tokio::sync::oneshot::channel();
        let keeper = self.clone();
        std::thread::Builder::new()
            .name(format!("shown {step}"))
            .spawn(move || {
                let worked = unshare(CloneFlags::CLONE_FS)
                    .map_err(io::Error::from)
                    .and_then(|()| work());
                if let Err(Ok(late)) = done.send(worked) {
                    undo(&keeper, late);
                }
            })?;
        match tokio::time::timeout(STEP_LIMIT, result).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(io::Error::other("the thread is gone")),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn place(&self, wanted: &Wanted) -> io::Result<Mounted> {
        enter(&self.mounts.host)?;
        let target = find(&wanted.volume, &wanted.path)?;
        let FileSystem { device, mount } =
            file_system(&self.name, Root::Directory, wanted.read_only)?;
        let how = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&mount, "", &target, "", how).map_err(named("mount"))?;
        let mounted = Mounted {
            device: Arc::new(device),
            mount: Arc::new(mount),
        };
        let hidden = enter(&self.mounts.own).and_then(|()| self.hide(wanted, &mounted));
        match hidden {
            Ok(()) => Ok(mounted),
            Err(error) => {
                self.take(mounted);
                Err(error)
            }
        }
    }

    /// Takes the mount out of the shim's namespace. First out of the share, where it certainly is and the VM would see it, so
    /// that it is there for as short as can be.
    fn hide(&self, wanted: &Wanted, mounted: &Mounted) -> io::Result<()> {
        let own = device_of(&mounted.mount)?;
        let share = directory(&self.share)?;
        let below = Path::new(&wanted.place).join(&wanted.path);
        hide_at(&share, &below, own)?;
        let root = directory(Path::new("/"))?;
        let table = std::fs::read_to_string("/proc/thread-self/mountinfo")?;
        for point in points(&table, &self.name) {
            hide_at(&root, point.strip_prefix("/").unwrap_or(&point), own)?;
        }
        Ok(())
    }

    /// Lazily, by descriptor: whatever is at its path by now, this mount goes and no other.
    fn take(&self, mounted: Mounted) {
        let gone = enter(&self.mounts.host).and_then(|()| {
            let path = format!("/proc/thread-self/fd/{}", mounted.mount.as_raw_fd());
            Ok(unmount(path, UnmountFlags::DETACH)?)
        });
        match gone {
            // Somebody on the host has taken it away.
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
                tracing::warn!(%error, "a mount of the guest stays on the host, dead");
            }
            _ => {}
        }
    }

    /// Keeps the sandbox's paths together for messages.
    pub fn describe(wanted: &Wanted) -> PathBuf {
        wanted.volume.source.join(&wanted.path)
    }
}

fn directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(open(path, flags, Mode::empty())?)
}

/// The directory to mount on.
fn find(volume: &Volume, path: &str) -> io::Result<OwnedFd> {
    let base = directory(&volume.source)?;
    let facts = rustix::fs::fstat(&base)?;
    if (facts.st_dev, facts.st_ino) != (volume.device, volume.inode) {
        return Err(io::Error::other("the volume is another one by now"));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(&base, path, flags, Mode::empty(), strict()).map_err(named("find the mount point"))
}

fn strict() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

/// Number of the file system, without asking it.
fn device_of(file: &OwnedFd) -> io::Result<(u32, u32)> {
    let how = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let facts = statx(file, "", how, StatxFlags::TYPE)?;
    Ok((facts.stx_dev_major, facts.stx_dev_minor))
}

/// Takes the file system `own` away from `path` below `base`, if it is there.
fn hide_at(base: &OwnedFd, path: &Path, own: (u32, u32)) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(place) = openat2(base, path, flags, Mode::empty(), strict()) else {
        return Ok(());
    };
    if device_of(&place)? != own {
        return Ok(());
    }
    let path = format!("/proc/thread-self/fd/{}", place.as_raw_fd());
    match unmount(path, UnmountFlags::DETACH) {
        Ok(()) | Err(rustix::io::Errno::INVAL) => Ok(()),
        Err(errno) => Err(named("take it out of the shim's namespace")(errno)),
    }
}

/// Lets the kernel forget what nobody uses of a file system: a change of its options that changes none. Blocks, and as long
/// as the guest likes where a process has written to a mapped file; the file system's end ends it.
///
/// # Errors
/// The kernel's.
pub fn forget(mount: &OwnedFd) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC;
    let context = fspick(mount, "", flags)?;
    Ok(fsconfig_reconfigure(context.as_fd())?)
}

/// Takes every mount of that name away in the calling thread's namespace; what a shim left that was killed. Blocks, but
/// never on the mounts themselves: their answers ended with the shim.
pub fn sweep(name: &str) {
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    for point in points(&table, name) {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if let Err(error) = unmount(&point, flags) {
            tracing::warn!(point = %point.display(), %error, "a dead mount of a guest stays");
        }
    }
}

/// Mount points of that name, later ones first.
fn points(table: &str, name: &str) -> Vec<PathBuf> {
    let own = mounts(table).rev();
    own.filter(|mount| (mount.kind, mount.source) == (KIND, name))
        .map(|mount| mount.point)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn our_mounts_are_found_by_name() {
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
    fn mount_points_are_found_below_the_volume_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let source = dir.path().join("volume");
        std::fs::create_dir_all(source.join("a/b")).expect("directories");
        std::fs::write(source.join("file"), "x").expect("a file");
        symlink("a", source.join("link")).expect("a link");
        symlink("/etc", source.join("out")).expect("a link");
        let metadata = std::fs::metadata(&source).expect("it is there");
        let volume = Volume {
            source: source.clone(),
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        assert!(find(&volume, "a/b").is_ok());
        for bad in [
            "..", "a/../..", "/etc", "link/b", "out", "file", "missing", "",
        ] {
            assert!(find(&volume, bad).is_err(), "{bad:?}");
        }
        let other = Volume { inode: 1, ..volume };
        assert!(find(&other, "a/b").is_err());
    }
}
