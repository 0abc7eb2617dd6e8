//! [`remove_state`]: removes the on-disk and kernel state of a container, after its end or after a failed creation.

use crate::cgroup::Cgroup;
use crate::storage::layers::Layers;
use crate::storage::rootfs::Rootfs;
use boxlite_sys::report::report;
use std::io;
use std::path::Path;

/// Removes everything that the creation of the container and libcontainer made. Blocks.
pub(crate) fn remove_state(layers: &Layers, cgroup: &Cgroup, rootfs: &Rootfs, state: &Path) {
    if let Err(error) = cgroup.remove() {
        tracing::warn!(error = report(&error), "failed to remove cgroup");
    }
    if let Err(error) = rootfs.take_down(layers) {
        tracing::warn!(error = report(&error), "failed to remove root filesystem");
    }
    match std::fs::remove_dir_all(state) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "failed to remove container state")
        }
        _ => {}
    }
}
