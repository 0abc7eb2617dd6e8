//! The jail's root: a tmpfs with bind mounts of the listed files, entered by pivot_root.
//!
//! The share keeps its propagation: what the shim mounts there later arrives here, because this namespace is a slave of
//! the shim's. All else is a plain bind mount.

use super::HostFiles;
use super::{JailError, at_path, system};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// Directory of the VM's working directory on which the jail's root is mounted; inside the jail it is empty.
const ROOT_DIR: &str = "root";
/// Size of the root's tmpfs: it holds mount points only.
const ROOT_OPTIONS: &str = "size=1m,mode=755";
/// Device nodes every process may expect.
const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];
const NONE: Option<&str> = None;

/// Builds the root and enters it. The mount namespace must be the caller's own already.
pub(super) fn enter(files: &HostFiles) -> Result<(), JailError> {
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(NONE, "/", NONE, slave, NONE)
        .map_err(system("making the mounts slaves of the shim's"))?;

    let root = files.work_dir.join(ROOT_DIR);
    match fs::DirBuilder::new().mode(0o700).create(&root) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(at_path("creating", &root)(error));
        }
        _ => {}
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("tmpfs"),
        &root,
        Some("tmpfs"),
        flags,
        Some(ROOT_OPTIONS),
    )
    .map_err(at_path("mounting", &root))?;

    populate(&root, files)?;
    chdir(&root).map_err(at_path("entering", &root))?;
    // The old root ends up on top of the new one at ".", and is taken off.
    pivot_root(".", ".").map_err(system("changing the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(system("taking the host's root off"))?;

    let proc = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    // Read-only: root could write /proc/sys by file mode alone. Not subset=pid: virtiofsd insists on reading fs.nr_open.
    mount(Some("proc"), "/proc", Some("proc"), proc, NONE).map_err(system("mounting /proc"))?;
    let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
    mount(NONE, "/", NONE, sealed, NONE).map_err(system("making the root read-only"))?;
    chdir(&files.work_dir).map_err(at_path("entering", &files.work_dir))
}

fn populate(root: &Path, files: &HostFiles) -> Result<(), JailError> {
    for name in ["proc", "dev", "tmp"] {
        let path = root.join(name);
        fs::create_dir(&path).map_err(at_path("creating", &path))?;
    }
    for path in &files.optional {
        if fs::symlink_metadata(path).is_ok() {
            bind(root, path, Access::ReadOnly)?;
        }
    }
    for path in &files.read_only {
        bind(root, path, Access::ReadOnly)?;
    }
    for path in DEVICES {
        bind(root, Path::new(path), Access::Full)?;
    }
    for path in &files.read_write {
        bind(root, path, Access::Full)?;
    }
    bind(root, &files.work_dir, Access::Full)?;
    bind(root, &files.share, Access::Tree)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    ReadOnly,
    Full,
    /// With the mounts below, which keep their flags; itself read-only.
    Tree,
}

/// The place of `path` below the new root.
fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn bind(root: &Path, path: &Path, access: Access) -> Result<(), JailError> {
    let target = inside(root, path);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(at_path("creating", parent))?;
    }
    let kind = fs::symlink_metadata(path)
        .map_err(at_path("looking at", path))?
        .file_type();
    // `/lib` → `usr/lib`: as on the host. What it points to is listed by itself.
    if kind.is_symlink() && access == Access::ReadOnly {
        let to = fs::read_link(path).map_err(at_path("reading", path))?;
        if to.is_relative() {
            return symlink(&to, &target).map_err(at_path("linking", &target));
        }
    }
    let directory = fs::metadata(path)
        .map_err(at_path("looking at", path))?
        .is_dir();
    if fs::symlink_metadata(&target).is_err() {
        let made = match directory {
            true => fs::create_dir(&target),
            false => fs::File::create(&target).map(drop),
        };
        made.map_err(at_path("creating", &target))?;
    }
    let recursive = match access {
        Access::Tree => MsFlags::MS_REC,
        Access::ReadOnly | Access::Full => MsFlags::empty(),
    };
    mount(
        Some(path),
        &target,
        NONE,
        MsFlags::MS_BIND | recursive,
        NONE,
    )
    .map_err(at_path("binding", path))?;
    // The share's own tmpfs holds mount points only; writable ones below keep their own flags. A guest must not be able to
    // exchange a mount point for a link.
    if access != Access::Full {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        let flags = flags | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(NONE, &target, NONE, flags, NONE).map_err(at_path("making read-only", path))?;
    }
    Ok(())
}
