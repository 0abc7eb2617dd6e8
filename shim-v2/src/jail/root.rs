//! The jail's root: a tmpfs with bind mounts of the listed files, entered by pivot_root.
//!
//! The share keeps its propagation: later mounts of the shim appear here because this namespace is a slave of the shim's. All
//! other paths are plain bind mounts.

use super::{HostFiles, JailError, ProcFiles, at_path, system};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};
use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

/// Directory below the VM's working directory on which the jail's root is mounted; empty inside the jail.
const ROOT_DIR: &str = "root";
/// Mount options of the root's tmpfs: it holds mount points only.
const ROOT_OPTIONS: &str = "size=1m,mode=755";
/// Device nodes that programs expect.
pub(super) const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];
const NONE: Option<&str> = None;

/// Builds the root and enters it. The caller must have its own mount namespace.
pub(super) fn enter(files: &HostFiles) -> Result<(), JailError> {
    let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(NONE, "/", NONE, slave, NONE).map_err(system("make the mounts slaves of the shim's"))?;

    let root = files.work_dir.join(ROOT_DIR);
    match fs::DirBuilder::new().mode(0o700).create(&root) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(at_path("create", &root)(error));
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
    .map_err(at_path("mount", &root))?;

    populate(&root, files)?;
    chdir(&root).map_err(at_path("enter", &root))?;
    // The old root is stacked on the new one at "." and unmounted from there.
    pivot_root(".", ".").map_err(system("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(system("unmount the host's root"))?;

    mount_proc(files.proc)?;
    let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
    mount(NONE, "/", NONE, sealed, NONE).map_err(system("make the root read-only"))?;
    chdir(&files.work_dir).map_err(at_path("enter", &files.work_dir))
}

fn mount_proc(visible: ProcFiles) -> Result<(), JailError> {
    /// Holds the descriptors' directory while /proc is removed.
    const HOLD: &str = "/tmp";
    const DESCRIPTORS: &str = "/proc/self/fd";
    // Read-only: root could write /proc/sys by file mode alone. Not subset=pid: virtiofsd reads fs.nr_open.
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("proc"), "/proc", Some("proc"), flags, NONE).map_err(system("mount /proc"))?;
    if visible == ProcFiles::All {
        return Ok(());
    }
    let step = "mount the descriptors";
    let bind = |from: &str, to: &str, flags| mount(Some(from), to, NONE, flags, NONE);
    bind(DESCRIPTORS, HOLD, MsFlags::MS_BIND).map_err(system(step))?;
    umount2("/proc", MntFlags::MNT_DETACH).map_err(system("unmount /proc"))?;
    let path = Path::new(DESCRIPTORS);
    fs::create_dir_all(path).map_err(at_path("create", path))?;
    bind(HOLD, DESCRIPTORS, MsFlags::MS_MOVE).map_err(system(step))
}

fn populate(root: &Path, files: &HostFiles) -> Result<(), JailError> {
    for name in ["proc", "dev", "tmp"] {
        let path = root.join(name);
        fs::create_dir(&path).map_err(at_path("create", &path))?;
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
    /// Read-only itself, with the mounts below it, which keep their flags.
    Tree,
}

/// Returns the path of `path` below the new root.
fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn bind(root: &Path, path: &Path, access: Access) -> Result<(), JailError> {
    let target = inside(root, path);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(at_path("create", parent))?;
    }
    let kind = fs::symlink_metadata(path)
        .map_err(at_path("stat", path))?
        .file_type();
    // Links such as `/lib` → `usr/lib` are copied; their targets are listed separately.
    if kind.is_symlink() && access == Access::ReadOnly {
        let to = fs::read_link(path).map_err(at_path("read", path))?;
        if to.is_relative() {
            return symlink(&to, &target).map_err(at_path("link", &target));
        }
    }
    let directory = fs::metadata(path).map_err(at_path("stat", path))?.is_dir();
    if fs::symlink_metadata(&target).is_err() {
        let made = match directory {
            true => fs::create_dir(&target),
            false => fs::File::create(&target).map(drop),
        };
        made.map_err(at_path("create", &target))?;
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
    .map_err(at_path("bind", path))?;
    // The share's tmpfs holds mount points only; writable mounts below it keep their flags. Read-only, so that the guest
    // cannot replace a mount point by a link.
    let device = path.starts_with("/dev");
    let flags = match access {
        Access::Full if device => MsFlags::MS_NOEXEC,
        Access::Full => MsFlags::MS_NOEXEC | MsFlags::MS_NODEV,
        Access::ReadOnly | Access::Tree => MsFlags::MS_RDONLY | MsFlags::MS_NODEV,
    };
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NOSUID;
    mount(NONE, &target, NONE, flags, NONE).map_err(at_path("restrict the mount of", path))
}
