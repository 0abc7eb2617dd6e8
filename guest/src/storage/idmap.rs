//! ID-mapped mounts: a tree of files whose owners a user namespace maps, seen through a mount of its own.
//!
//! For the layers of a container in a user namespace: on disk an image's root is user 0, and in the VM that container's
//! root is another. The kernel's call for it has no safe form in the crates used here.

use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// `MOUNT_ATTR_IDMAP`.
const IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr` of the kernel (linux/mount.h).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// A mapped view of a mount at a place of its own, unmounted when dropped: an overlay keeps what it needs of it.
#[derive(Debug)]
pub struct Mapped {
    target: PathBuf,
}

impl Mapped {
    /// Mounts what is at `source` on the existing directory `target`, mapped by `user_namespace`. Blocks.
    pub fn mount(source: &Path, target: &Path, user_namespace: BorrowedFd<'_>) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(rustix::fs::CWD, source, flags)?;
        map(&tree, user_namespace)?;
        move_mount(
            &tree,
            "",
            rustix::fs::CWD,
            target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )?;
        Ok(Self {
            target: target.to_path_buf(),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Err(errno) = unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(%errno, target = %self.target.display(), "unmount a mapped layer");
        }
        let _ = std::fs::remove_dir(&self.target);
    }
}

fn map(tree: &OwnedFd, user_namespace: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = MountAttributes {
        set: IDMAP,
        clear: 0,
        propagation: 0,
        user_namespace: user_namespace.as_raw_fd() as u64,
    };
    // SAFETY: the path is a NUL-terminated literal, the attributes are live and their size is the one given; the kernel
    // only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
