//! ID-mapped mounts: copies of mounts whose file owners are translated by a user namespace.
//!
//! Used by the shim for volumes and by the guest agent for image layers of pods with a user namespace.

use crate::detached_mount::attach;
use crate::mount_attributes::set_user_namespace;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

/// Mounts the tree at `source` on `target`, a file or directory like it, with file owners mapped by `user_namespace`. With
/// `recursive`, the mounts below `source` are included. The mount is visible in the caller's mount namespace. Blocks.
///
/// # Errors
/// Those of open_tree(2), mount_setattr(2) (EINVAL: a file system below `source` does not support ID-mapped mounts) and
/// move_mount(2).
pub fn mount(
    source: &Path,
    target: &Path,
    user_namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    let tree = open_tree(rustix::fs::CWD, source, flags)?;
    set_user_namespace(&tree, user_namespace, recursive)?;
    attach(&tree, target)
}
