//! Mount points of a container that are symlinks in its image: [`resolve`], and its working directory:
//! [`make_working_directory`].
//!
//! libcontainer fails on a mount point that is a dangling symlink. As in runc, the link is resolved within the root
//! filesystem and the missing target is created. Nothing runs in the tree yet, so it does not change meanwhile.

use super::StorageError;
use boxlite_sys::storage_full::is_full;
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Maximum number of symlinks in a path, as in the kernel.
const MAX_SYMLINKS: u32 = 40;

/// Replaces destinations in `spec` that lead through symlinks of the tree at `root` by their targets, and creates missing
/// targets. Targets below another mount are not changed. Blocks.
///
/// # Errors
/// If a link cannot be resolved, or a target cannot be created.
pub(crate) fn resolve(root: &Path, spec: &mut Spec) -> Result<(), StorageError> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut covered: Vec<PathBuf> = Vec::new();
    for mount in &mut mounts {
        let destination = mount.destination().clone();
        let resolved = follow(root, &destination, &covered)
            .map_err(StorageError::path("resolve mount point", &destination))?;
        if let Some(target) = &resolved {
            create(root, target, is_file(mount))
                .map_err(StorageError::path("create mount point", &destination))?;
            mount.set_destination(target.clone());
        }
        covered.push(resolved.unwrap_or(destination));
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

/// Creates the working directory of the container if it is missing, as runc does, and checks that it is a directory. One on a
/// volume is created in the volume and not checked: the container's chdir does. Blocks.
///
/// # Errors
/// NotADirectory, or the cause if the disk is full.
pub(crate) fn make_working_directory(root: &Path, spec: &Spec, path: &Path) -> io::Result<()> {
    let mounts = || spec.mounts().iter().flatten();
    let covered: Vec<PathBuf> = mounts().map(|mount| mount.destination().clone()).collect();
    let target = follow(root, path, &covered)?.unwrap_or_else(|| path.to_owned());
    let mount = mounts()
        .filter(|mount| target.starts_with(mount.destination()))
        .max_by_key(|mount| mount.destination().components().count());
    let Some(mount) = mount else {
        let made = make_directory(root, &target);
        return match (fs::symlink_metadata(below(root, &target)), made) {
            (Ok(facts), _) if facts.is_dir() => Ok(()),
            (_, Err(error)) if is_full(&error) => Err(error),
            _ => Err(io::ErrorKind::NotADirectory.into()),
        };
    };
    if is_writable_bind(mount)
        && let Some(source) = mount.source()
        && let Ok(rest) = target.strip_prefix(mount.destination())
    {
        let _ = make_directory(source, rest);
    }
    Ok(())
}

fn is_writable_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    let has = |names: &[&str]| {
        options
            .iter()
            .any(|option| names.contains(&option.as_str()))
    };
    (has(&["bind", "rbind"]) || mount.typ().as_deref() == Some("bind")) && !has(&["ro", "rro"])
}

/// Returns the absolute target of `path` in the tree; None if no symlink is involved. Stops at mount points in `covered`.
fn follow(root: &Path, path: &Path, covered: &[PathBuf]) -> io::Result<Option<PathBuf>> {
    let mut pending: Vec<PathBuf> = parts(path);
    let mut done = PathBuf::from("/");
    let mut links = 0;
    while let Some(part) = pending.pop() {
        if part == Path::new("..") {
            done.pop();
            continue;
        }
        done.push(part);
        if covered.iter().any(|mount| done == *mount && mount != path) {
            // The tree below is that of another mount.
            done.extend(pending.drain(..).rev());
            break;
        }
        let Ok(target) = fs::read_link(below(root, &done)) else {
            continue;
        };
        links += 1;
        if links > MAX_SYMLINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        done.pop();
        if target.is_absolute() {
            done = PathBuf::from("/");
        }
        pending.extend(parts(&target));
    }
    Ok((links > 0).then_some(done))
}

/// Returns the components of a path in reverse order, without the root and `.`.
fn parts(path: &Path) -> Vec<PathBuf> {
    let parts = path.components().rev().filter_map(|part| match part {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        _ => None,
    });
    parts.collect()
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// Opens the directory `path` of the tree at `root`, with symlinks resolved within the tree. Creates it if it is missing.
/// Blocks.
///
/// # Errors
/// NotADirectory, or the failed system call.
pub(crate) fn open_directory(root: &Path, path: &Path) -> io::Result<OwnedFd> {
    let target = follow(root, path, &[])?.unwrap_or_else(|| path.to_owned());
    make_directory(root, &target)?;
    let root = fs::File::open(root)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(&root, &target, flags, Mode::empty(), resolve)?)
}

fn is_file(mount: &Mount) -> bool {
    let source = mount.source().as_deref();
    let options = mount.options().as_deref().unwrap_or_default();
    let bind = options.iter().any(|o| o == "bind" || o == "rbind");
    (bind || mount.typ().as_deref() == Some("bind")) && source.is_some_and(|path| !path.is_dir())
}

fn create(root: &Path, target: &Path, file: bool) -> io::Result<()> {
    if fs::symlink_metadata(below(root, target)).is_ok() {
        return Ok(());
    }
    if !file {
        return make_directory(root, target);
    }
    make_directory(root, target.parent().unwrap_or(Path::new("/")))?;
    fs::File::create_new(below(root, target)).map(drop)
}

/// Creates a directory and its parents inside the tree at `root`; symlinks are resolved within the tree.
pub(crate) fn make_directory(root: &Path, path: &Path) -> io::Result<()> {
    let root = fs::File::open(root)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let mut done = PathBuf::new();
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        let parent = openat2(
            root.as_fd(),
            if done.as_os_str().is_empty() {
                Path::new(".")
            } else {
                &done
            },
            flags,
            Mode::empty(),
            resolve,
        )?;
        done.push(name);
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::symlink;

    fn tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir_all(root.path().join("opt/real")).unwrap();
        fs::write(root.path().join("opt/file"), "").unwrap();
        let link = |target: &str, path: &str| symlink(target, root.path().join(path)).unwrap();
        link("../run/systemd/resolve/stub.conf", "etc/resolv.conf");
        link("/nowhere/hosts", "etc/hosts");
        link("/opt/second", "opt/first");
        link("../../../missing/dir", "opt/second");
        link("loop", "opt/loop");
        link("real", "opt/good");
        link("/dev/shm", "shm");
        root
    }

    #[test]
    fn resolve_dangling_links_creates_their_targets() {
        let root = tree();
        let file = root.path().join("opt/file");
        let bind =
            |source: &Path, at: &str| json!({"destination": at, "type": "bind", "source": source});
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            bind(&file, "/etc/resolv.conf"), bind(&file, "/etc/hosts"), bind(root.path(), "/opt/first"),
            bind(root.path(), "/opt/good/sub"), bind(root.path(), "/shm/x"), bind(&file, "/plain"),
        ]}))
        .unwrap();
        resolve(root.path(), &mut spec).unwrap();
        let mounts = spec.mounts().clone().unwrap();
        let at: Vec<_> = mounts
            .iter()
            .map(|mount| mount.destination().to_str().unwrap())
            .collect();
        assert_eq!(
            at,
            [
                "/dev",
                "/run/systemd/resolve/stub.conf",
                "/nowhere/hosts",
                "/missing/dir",
                "/opt/real/sub",
                "/dev/shm/x",
                "/plain"
            ]
        );
        assert!(root.path().join("run/systemd/resolve/stub.conf").is_file());
        assert!(root.path().join("nowhere/hosts").is_file());
        assert!(root.path().join("missing/dir").is_dir());
        assert!(!root.path().join("plain").exists(), "left to libcontainer");
    }

    #[test]
    fn open_directory_creates_and_stays_in_the_tree() {
        let root = tree();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), root.path().join("out")).unwrap();
        let inode = |path: &str| {
            let opened = open_directory(root.path(), Path::new(path))?;
            rustix::fs::fstat(&opened)
                .map(|facts| facts.st_ino)
                .map_err(io::Error::from)
        };
        let expect = |path: &str, target: &str| {
            use std::os::unix::fs::MetadataExt;
            let found = inode(path).unwrap();
            let facts = fs::symlink_metadata(root.path().join(target)).unwrap();
            assert!(facts.is_dir() && facts.ino() == found, "{path}");
        };
        expect("/opt/good", "opt/real");
        expect("/opt/first", "missing/dir");
        expect("/new/deep", "new/deep");
        let inner = outside.path().strip_prefix("/").unwrap().join("sub");
        expect("/out/sub", inner.to_str().unwrap());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        for path in ["/opt/file", "/opt/file/below", "/opt/loop"] {
            assert!(inode(path).is_err(), "{path}");
        }
    }

    #[test]
    fn resolve_loop_of_links_names_the_mount_point() {
        let root = tree();
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/opt/loop", "type": "bind", "source": "/"}]}))
        .unwrap();
        let error = resolve(root.path(), &mut spec).unwrap_err().to_string();
        assert!(error.contains("/opt/loop"), "{error}");
    }

    #[test]
    fn make_working_directory_accepts_only_directories() {
        let root = tree();
        let spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"}]}))
        .unwrap();
        let make = |path: &str| make_working_directory(root.path(), &spec, Path::new(path));
        for path in ["/", "/opt", "/opt/good", "/proc", "/proc/any", "/made/here"] {
            assert!(make(path).is_ok(), "{path}");
        }
        assert!(root.path().join("made/here").is_dir());
        for path in ["/opt/file", "/opt/loop", "/opt/file/below"] {
            assert!(make(path).is_err(), "{path}");
        }
    }

    #[test]
    fn make_directory_stays_inside_the_root() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
        make_directory(root.path(), Path::new("/a/b/c")).unwrap();
        assert!(root.path().join("a/b/c").is_dir());
        assert!(make_directory(root.path(), Path::new("/link/x")).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        make_directory(root.path(), Path::new("/a/../../b")).unwrap();
    }

    #[test]
    fn make_working_directory_creates_it_in_a_writable_volume() {
        let (root, volume) = (tree(), tempfile::tempdir().unwrap());
        for (options, created) in [(json!(["rbind"]), true), (json!(["rbind", "ro"]), false)] {
            let spec: Spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": [
                {"destination": "/data", "type": "bind", "source": volume.path(), "options": options}]}))
            .unwrap();
            let path = format!("/data/new/{created}");
            make_working_directory(root.path(), &spec, Path::new(&path)).unwrap();
            let made = volume.path().join(format!("new/{created}"));
            assert_eq!(made.exists(), created, "{options}");
        }
        assert!(!root.path().join("data").exists());
    }
}
