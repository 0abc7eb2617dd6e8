//! Volumes in memory: a kubelet's emptyDir with medium Memory becomes a tmpfs of the guest.
//!
//! The kubelet mounts a tmpfs at `…/kubernetes.io~empty-dir/<name>` and passes it as an ordinary host path, or a bind mount
//! of one of its directories for a subPath. Served by virtiofs it would be neither a tmpfs nor counted to the pod's memory.
//! Other volumes on tmpfs (Secrets, ConfigMaps, hostPath) hold data of the host and remain in the share.

use boxlite_proto::names::{DIRECTORY_OPTION, SIZE_OPTION};
use boxlite_sys::mountinfo::{Mount, mounts, unescape};
use nix::sys::statfs::statfs;
use sha2::{Digest, Sha256};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Directory of a pod's emptyDir volumes, as the kubelet's plugin names it.
const EMPTY_DIR_PLUGIN: &str = "kubernetes.io~empty-dir";

/// A tmpfs of the guest in place of a host directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MemoryVolume {
    /// Name of the tmpfs; equal for all mounts of the volume.
    pub name: String,
    /// Options of the guest's mount: size, and the directories with their modes and owners.
    pub options: Vec<String>,
}

/// Location of a path in a memory volume.
#[derive(Debug, PartialEq, Eq)]
struct VolumePath {
    /// Mount point of the volume.
    root: PathBuf,
    /// `major:minor` of the tmpfs.
    device: String,
    /// Path below the root; empty for the root.
    path: PathBuf,
}

/// Returns the guest's tmpfs for `source`, an absolute path without symbolic links; None if it is not a directory of a memory
/// volume. Reads the calling thread's mount table.
///
/// # Errors
/// The mount table or the volume cannot be read.
pub(crate) fn volume(source: &Path) -> io::Result<Option<MemoryVolume>> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
    match find(&table, source) {
        Some(found) if source.is_dir() => Ok(Some(describe(&found)?)),
        _ => Ok(None),
    }
}

/// Returns the option with the size of the file system at `path`; None if it has no limit.
///
/// # Errors
/// Those of statfs(2).
pub(crate) fn size_option(path: &Path) -> io::Result<Option<String>> {
    let facts = statfs(path)?;
    let bytes = facts.blocks() * facts.block_size().cast_unsigned();
    Ok((bytes != 0).then(|| format!("{SIZE_OPTION}{bytes}")))
}

fn find(table: &str, source: &Path) -> Option<VolumePath> {
    let all: Vec<Mount> = mounts(table).collect();
    // Of mounts at the same point the last is on top.
    let mount = all
        .iter()
        .filter(|mount| source.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.components().count())?;
    if mount.kind != "tmpfs" {
        return None;
    }
    let volume = all.iter().rfind(|other| {
        let plugin = other.point.parent().and_then(Path::file_name);
        other.device == mount.device
            && other.root == "/"
            && plugin.is_some_and(|name| name == EMPTY_DIR_PLUGIN)
    })?;
    let root = unescape(mount.root);
    let below = source.strip_prefix(&mount.point).ok()?;
    Some(VolumePath {
        root: volume.point.clone(),
        device: volume.device.to_owned(),
        // Collected from components: joining an empty path would append a slash.
        path: root.strip_prefix("/").ok()?.iter().chain(below).collect(),
    })
}

fn describe(found: &VolumePath) -> io::Result<MemoryVolume> {
    let mut options: Vec<String> = size_option(&found.root)?.into_iter().collect();
    let mut path = PathBuf::new();
    let names = std::iter::once(None).chain(found.path.iter().map(Some));
    for name in names {
        path.extend(name);
        // The subPath's bind mount is of this directory; a link would be resolved on the host only.
        let facts = fs::symlink_metadata(found.root.join(&path))?;
        if !facts.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        options.push(format!(
            "{DIRECTORY_OPTION}{:o}:{}:{}:{}",
            facts.mode() & 0o7777,
            facts.uid(),
            facts.gid(),
            path.display()
        ));
    }
    let mut hash = Sha256::new();
    hash.update(found.device.as_bytes());
    hash.update([0]);
    hash.update(found.root.as_os_str().as_encoded_bytes());
    Ok(MemoryVolume {
        name: hex::encode(hash.finalize()),
        options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
1 0 0:1 / / rw - ext4 /dev/sda rw
2 1 0:2 / /pods/u/volumes/kubernetes.io~empty-dir/cache rw - tmpfs tmpfs rw,size=65536k
3 1 0:3 / /pods/u/volumes/kubernetes.io~secret/token rw - tmpfs tmpfs rw,size=65536k
4 1 0:2 /sub/dir /pods/u/volume-subpaths/cache/c/0 rw - tmpfs tmpfs rw,size=65536k
5 1 0:4 / /run rw - tmpfs tmpfs rw
6 1 0:1 /disk /pods/u/volumes/kubernetes.io~empty-dir/disk rw - ext4 /dev/sda rw
7 2 0:5 / /pods/u/volumes/kubernetes.io~empty-dir/cache/other rw - ext4 /dev/sdb rw
";

    fn path_of(source: &str) -> Option<String> {
        let found = find(TABLE, Path::new(source))?;
        assert!(found.root.ends_with("kubernetes.io~empty-dir/cache"));
        Some(found.path.display().to_string())
    }

    #[test]
    fn find_recognizes_memory_empty_dirs_and_subpaths() {
        let cache = "/pods/u/volumes/kubernetes.io~empty-dir/cache";
        assert_eq!(path_of(cache).as_deref(), Some(""));
        assert_eq!(path_of(&format!("{cache}/a/b")).as_deref(), Some("a/b"));
        let sub = path_of("/pods/u/volume-subpaths/cache/c/0");
        assert_eq!(sub.as_deref(), Some("sub/dir"));
    }

    #[test]
    fn find_ignores_other_tmpfs_and_disk_volumes() {
        for source in [
            "/pods/u/volumes/kubernetes.io~secret/token",
            "/pods/u/volumes/kubernetes.io~empty-dir/disk",
            "/pods/u/volumes/kubernetes.io~empty-dir/plain",
            "/pods/u/volumes/kubernetes.io~empty-dir/cache/other",
            "/run/x",
            "/srv",
        ] {
            assert_eq!(find(TABLE, Path::new(source)), None, "{source}");
        }
    }

    #[test]
    fn describe_lists_directories_with_modes() {
        let dir = tempfile::tempdir().expect("tempdir");
        fs::create_dir(dir.path().join("sub")).expect("directory");
        let facts = fs::metadata(dir.path().join("sub")).expect("metadata");
        let found = |path: &str| VolumePath {
            root: dir.path().to_owned(),
            device: "0:2".into(),
            path: path.into(),
        };
        let (whole, part) = (describe(&found("")), describe(&found("sub")));
        let (whole, part) = (whole.expect("described"), part.expect("described"));
        assert_eq!(whole.name, part.name);
        assert!(whole.options[0].starts_with("size="), "{whole:?}");
        assert_eq!((whole.options.len(), part.options.len()), (2, 3));
        let mode = facts.mode() & 0o7777;
        let expected = format!("dir={mode:o}:{}:{}:sub", facts.uid(), facts.gid());
        assert_eq!(part.options[2], expected);
        assert!(describe(&found("missing")).is_err());
    }
}
