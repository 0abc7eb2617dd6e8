//! Volumes in memory: a tmpfs for each volume, shared by the containers of the pod.
//!
//! They exist until the VM ends, like the pod's /dev/shm; their pages count to the container that wrote them. Containers can
//! change the tree at any time, so paths in it are resolved without following symlinks.

use super::{StorageError, mount_error};
use boxlite_proto::names::{DIRECTORY_OPTION, SIZE_OPTION};
use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Mount;
use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid, fchown, mkdirat, openat2};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

/// Directory of the mount points, by the volume's name.
const DIRECTORY: &str = "/run/boxlite/memory";

/// A directory of the volume, as described by the request.
#[derive(Debug, PartialEq, Eq)]
struct VolumeDirectory<'a> {
    mode: u32,
    uid: u32,
    gid: u32,
    /// Relative to the root; empty for the root.
    path: &'a Path,
}

impl<'a> VolumeDirectory<'a> {
    /// Parses `<mode, octal>:<uid>:<gid>:<path>`.
    fn parse(text: &'a str) -> Option<Self> {
        let mut fields = text.splitn(4, ':');
        let mode = u32::from_str_radix(fields.next()?, 8).ok()?;
        let (uid, gid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let path = Path::new(fields.next()?);
        let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
        plain.then_some(Self {
            mode: mode & 0o7777,
            uid,
            gid,
            path,
        })
    }
}

/// Opens the requested directory of a volume. Mounts the tmpfs on first use and creates missing directories. Blocks.
///
/// # Errors
/// If the name or a directory is invalid, or a system call fails.
pub(crate) fn open(request: &Mount) -> Result<OwnedFd, StorageError> {
    let name = request.source().as_deref().unwrap_or(Path::new(""));
    let text = name.to_string_lossy();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(escape(&text));
    }
    let options = request.options().iter().flatten();
    let mut size = None;
    let mut directories = Vec::new();
    for option in options {
        if let Some(bytes) = option.strip_prefix(SIZE_OPTION) {
            size = bytes.parse::<u64>().ok();
        } else if let Some(text) = option.strip_prefix(DIRECTORY_OPTION) {
            directories.push(VolumeDirectory::parse(text).ok_or_else(|| escape(text))?);
        }
    }
    let root = Path::new(DIRECTORY).join(name);
    if !root.exists() {
        mount_tmpfs(&root, size, directories.first())?;
    }
    let root = File::open(&root).map_err(StorageError::path("open", &root))?;
    let mut opened = OwnedFd::from(root);
    for directory in directories.iter().skip(1) {
        opened = create(&opened, directory)
            .map_err(StorageError::path("create directory", directory.path))?;
    }
    Ok(opened)
}

fn escape(path: &str) -> StorageError {
    StorageError::Escape {
        path: path.to_owned(),
        base: DIRECTORY,
    }
}

fn mount_tmpfs(
    target: &Path,
    size: Option<u64>,
    root: Option<&VolumeDirectory<'_>>,
) -> Result<(), StorageError> {
    fs::create_dir_all(target).map_err(StorageError::path("create directory", target))?;
    let mut options = match root {
        Some(root) => format!("mode={:o},uid={},gid={}", root.mode, root.uid, root.gid),
        None => "mode=1777".to_owned(),
    };
    // Without a size the kernel's default is half of the memory.
    if let Some(size) = size {
        options.push_str(&format!(",size={size}"));
    }
    let flags = MsFlags::MS_NODEV;
    let kind = Some("tmpfs");
    mount(kind, target, kind, flags, Some(options.as_str())).map_err(|errno| {
        // Otherwise the next caller would use the plain directory.
        let _ = fs::remove_dir(target);
        mount_error("tmpfs", "memory", &target.display().to_string(), errno)
    })
}

/// Opens the last component of `directory` below its opened parent, creating it with mode and owner if it is missing.
fn create(parent: &OwnedFd, directory: &VolumeDirectory<'_>) -> io::Result<OwnedFd> {
    let name = directory
        .path
        .file_name()
        .ok_or(io::ErrorKind::InvalidInput)?;
    let mode = Mode::from_raw_mode(directory.mode);
    let created = match mkdirat(parent, name, mode) {
        Ok(()) => true,
        Err(rustix::io::Errno::EXIST) => false,
        Err(errno) => return Err(errno.into()),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let opened = openat2(parent, name, flags, Mode::empty(), resolve)?;
    if created {
        let (uid, gid) = (Uid::from_raw(directory.uid), Gid::from_raw(directory.gid));
        fchown(&opened, Some(uid), Some(gid))?;
        // The umask was applied to the mode.
        rustix::fs::fchmod(&opened, mode)?;
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    #[test]
    fn open_rejects_names_with_separators() {
        for name in ["", "..", "a/b", "/etc"] {
            let mut request = Mount::default();
            request.set_source(Some(name.into()));
            assert!(open(&request).is_err(), "{name:?}");
        }
    }

    #[test]
    fn parse_accepts_only_plain_relative_paths() {
        let parsed = VolumeDirectory::parse("2770:5:7:a/b:c").unwrap();
        assert_eq!((parsed.mode, parsed.uid, parsed.gid), (0o2770, 5, 7));
        assert_eq!(parsed.path, Path::new("a/b:c"));
        assert_eq!(
            VolumeDirectory::parse("777:0:0:").unwrap().path,
            Path::new("")
        );
        for text in [
            "",
            "777",
            "9:0:0:x",
            "777:0:0:../x",
            "777:0:0:/x",
            "777:x:0:y",
        ] {
            assert_eq!(VolumeDirectory::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn create_sets_the_mode_and_follows_no_link() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let facts = fs::metadata(root.path()).unwrap();
        symlink(outside.path(), root.path().join("link")).unwrap();
        let opened = OwnedFd::from(File::open(root.path()).unwrap());
        let directory = |path| VolumeDirectory {
            mode: 0o1777,
            uid: facts.uid(),
            gid: facts.gid(),
            path,
        };
        create(&opened, &directory(Path::new("new"))).unwrap();
        let mode = fs::metadata(root.path().join("new")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o1777);
        create(&opened, &directory(Path::new("new"))).unwrap();
        assert!(create(&opened, &directory(Path::new("link"))).is_err());
    }
}
