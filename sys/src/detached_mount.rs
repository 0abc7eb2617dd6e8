//! Detached mounts: trees that fsmount(2) or open_tree(2) created and that are in no mount namespace yet.

use rustix::mount::{MoveMountFlags, move_mount};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

/// Attaches `tree` to the mount point `target` in the caller's mount namespace. Links in `target` are not followed.
///
/// # Errors
/// Those of move_mount(2).
pub fn attach(tree: impl AsFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(tree, "", rustix::fs::CWD, target, flags)?)
}
