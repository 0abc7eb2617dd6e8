//! [`stack`]: mounts an overlay of image layers.

use super::StorageError;
use boxlite_sys::detached_mount::attach;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use std::io;
use std::path::{Path, PathBuf};

/// Mounts an overlay of `lower`, lowest first, at `target`: writable with the upper layer in `writable`, else
/// read-only.
pub(crate) fn stack(
    lower: &[PathBuf],
    writable: Option<&Path>,
    target: &Path,
) -> Result<(), StorageError> {
    overlay(lower, writable, target).map_err(|source| StorageError::Mount {
        fstype: "overlay".to_owned(),
        origin: format!("of {} layers", lower.len()),
        target: target.display().to_string(),
        source,
    })
}

/// Mounts the overlay. Layers are passed one by one, because a single option string is limited to one page.
fn overlay(lower: &[PathBuf], writable: Option<&Path>, target: &Path) -> io::Result<()> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "overlay")?;
    for layer in lower.iter().rev() {
        fsconfig_set_string(&context, "lowerdir+", layer.as_path())?;
    }
    let mut attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
    if let Some(writable) = writable {
        fsconfig_set_string(&context, "upperdir", writable.join("upper"))?;
        fsconfig_set_string(&context, "workdir", writable.join("work"))?;
        // Not volatile, although the layer does not outlive the pod: fsync is how a program learns that the node's disk is
        // full, and after one such error a volatile overlay fails every fsync and the kernel mounts no other one.
        attributes = MountAttrFlags::empty();
    }
    fsconfig_create(&context)?;
    let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    attach(&tree, target)
}
