//! [`HostShare`]: the directory that the guest sees by virtiofs, on the host: a tmpfs of mount points, and what is mounted there.
//!
//! Two mounts of one tmpfs: the one the VMM serves is read-only and shared, so that mounts made later reach the vmm
//! child and the guest can change no mount point; the other is writable and the shim's alone. Everything is in the shim's
//! own mount namespace and ends with it.

use crate::error::{Result, ShimError};
use crate::sandbox::machine::Share;
use async_trait::async_trait;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

const NONE: Option<&str> = None;
/// The tmpfs holds mount points and nothing else.
const OPTIONS: &str = "size=16m,mode=755";
/// What is made in it at once: layers, volumes, root file systems.
const DIRECTORIES: [&str; 3] = ["l", "m", "r"];

/// See the module.
#[derive(Debug, Clone)]
pub struct HostShare {
    served: PathBuf,
    writable: PathBuf,
}

impl HostShare {
    /// The share of a bundle; nothing is mounted yet.
    pub fn new(bundle: &Path) -> Self {
        Self {
            served: bundle.join("share"),
            writable: bundle.join("share.rw"),
        }
    }

    /// The directory to be served.
    pub fn served(&self) -> &Path {
        &self.served
    }

    /// Mounts it, empty. [`HostShare::clear`] takes it away, also after a failure half way.
    ///
    /// # Errors
    /// Io, naming the directory.
    pub fn mount(&self) -> Result<()> {
        for dir in [&self.writable, &self.served] {
            make_dir(dir)?;
        }
        let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let (from, to) = (&self.writable, &self.served);
        do_mount(Some("tmpfs"), from, Some("tmpfs"), hardened, Some(OPTIONS))?;
        do_mount(NONE, from, NONE, MsFlags::MS_PRIVATE, NONE)?;
        for name in DIRECTORIES {
            make_dir(&from.join(name))?;
        }
        do_mount(Some(from.as_path()), to, NONE, MsFlags::MS_BIND, NONE)?;
        let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | hardened;
        do_mount(NONE, to, NONE, sealed, NONE)?;
        do_mount(NONE, to, NONE, MsFlags::MS_SHARED, NONE)
    }

    /// Takes everything away. Succeeds on what is not there.
    ///
    /// # Errors
    /// Io, naming the directory.
    pub fn clear(&self) -> Result<()> {
        for dir in [&self.served, &self.writable] {
            take_off(dir)?;
            // Not empty only where somebody else put something; the bundle's owner removes it.
            drop(fs::remove_dir(dir));
        }
        Ok(())
    }

    /// Makes the mount point for `path`, a directory or a file.
    fn place(&self, path: &str, directory: bool) -> Result<()> {
        check(path)?;
        let place = self.writable.join(path);
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent).map_err(ShimError::io("create", parent.display()))?;
        }
        let made = match directory {
            true => fs::create_dir(&place),
            false => fs::File::create_new(&place).map(drop),
        };
        made.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => ShimError::AlreadyExists {
                what: "place in the share",
                id: path.to_owned(),
            },
            _ => ShimError::io("create", place.display())(error),
        })
    }

    fn bind_now(&self, source: &Path, path: &str, read_only: bool) -> Result<()> {
        let kind = fs::metadata(source).map_err(ShimError::io("look at", source.display()))?;
        self.place(path, kind.is_dir())?;
        let target = self.served.join(path);
        do_mount(Some(source), &target, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        if read_only {
            // The flag is per mount: those below the source get it too, or the guest could write there.
            for mounted in mounts_below(&target)? {
                let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
                let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
                do_mount(NONE, &mounted, NONE, flags, NONE)?;
            }
        }
        Ok(())
    }

    fn unbind_now(&self, path: &str) -> Result<()> {
        check(path)?;
        take_off(&self.served.join(path))?;
        let place = self.writable.join(path);
        let removed = match fs::symlink_metadata(&place) {
            Ok(kind) if kind.is_dir() => fs::remove_dir(&place),
            Ok(_) => fs::remove_file(&place),
            Err(error) => Err(error),
        };
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ShimError::io("remove", place.display())(error)),
            _ => {
                // The container's directory goes with its last mount.
                if let Some(parent) = place.parent().filter(|parent| !is_top(&self.writable, parent)) {
                    drop(fs::remove_dir(parent));
                }
                Ok(())
            }
        }
    }
}

#[async_trait]
impl Share for HostShare {
    async fn bind(&self, source: &Path, path: &str, read_only: bool) -> Result<()> {
        let (share, source, path) = (self.clone(), source.to_owned(), path.to_owned());
        blocking(move || share.bind_now(&source, &path, read_only)).await
    }

    async fn mount(&self, kind: &str, source: &str, options: &[String], path: &str) -> Result<()> {
        let (share, path) = (self.clone(), path.to_owned());
        let (kind, source, options) = (kind.to_owned(), source.to_owned(), options.to_vec());
        blocking(move || {
            share.place(&path, true)?;
            let (flags, data) = split_options(&options);
            let target = share.served.join(&path);
            do_mount(Some(source.as_str()), &target, Some(kind.as_str()), flags, Some(data.as_str()))
        })
        .await
    }

    async fn unbind(&self, path: &str) -> Result<()> {
        let (share, path) = (self.clone(), path.to_owned());
        blocking(move || share.unbind_now(&path)).await
    }
}

/// Runs file work on a thread that may wait for a disk.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ShimError::Ending)?
}

fn is_top(root: &Path, dir: &Path) -> bool {
    dir == root || DIRECTORIES.iter().any(|name| dir == root.join(name))
}

fn check(path: &str) -> Result<()> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if plain && !path.is_empty() {
        return Ok(());
    }
    Err(ShimError::Invalid {
        field: "path in the share",
        reason: format!("{path:?}"),
    })
}

fn make_dir(dir: &Path) -> Result<()> {
    match fs::DirBuilder::new().mode(0o755).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(ShimError::io("create", dir.display())(error)),
        _ => Ok(()),
    }
}

fn do_mount<S: ?Sized + nix::NixPath>(
    source: Option<&S>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<()> {
    mount(source, target, kind, flags, data)
        .map_err(|errno| ShimError::io("mount at", target.display())(errno.into()))
}

/// Unmounts lazily: the guest may still hold files there.
fn take_off(target: &Path) -> Result<()> {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => Ok(()),
        Err(errno) => Err(ShimError::io("unmount", target.display())(errno.into())),
    }
}

/// Mount points at and below `target`.
fn mounts_below(target: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(ShimError::io("read", "/proc/self/mountinfo"))?;
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(unescape(field)))
        .filter(|mounted| mounted.starts_with(target))
        .collect())
}

/// mountinfo writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(field.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// fstab-style options as mount(2) wants them.
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
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_stays_in_the_share() {
        for bad in ["", "/etc", "../x", "m/../../x", "./x"] {
            assert!(check(bad).is_err(), "{bad}");
        }
        check("m/c1/0").expect("a plain path");
    }

    #[test]
    fn options_are_flags_or_data() {
        let options = ["ro", "lowerdir=/a:/b", "noexec", "xino=off"].map(str::to_owned);
        let (flags, data) = split_options(&options);
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC);
        assert_eq!(data, "lowerdir=/a:/b,xino=off");
    }
}
