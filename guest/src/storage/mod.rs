//! Filesystems of the pod: the virtiofs share, the scratch disk, image layers, and containers' root filesystems.
//!
//! All functions block and are called through `spawn_blocking`. Layers are untrusted; paths inside them are not
//! followed.
//!
//! ```text
//! /run/boxlite/share            virtiofs: l/*.erofs, m/<digest>, b/<number>-<rw|ro>, r/<container>
//! /run/boxlite/scratch          ext4 on virtio-blk, or a tmpfs
//! /run/boxlite/scratch/c/<id>/  upper and work of a container's overlay
//! /run/boxlite/c/<id>/          bundle: config.json, rootfs, volumes/<n> (image volumes)
//! /run/boxlite/memory/<name>    tmpfs of a volume in memory, shared by containers of the pod
//! /run/boxlite/mirror/<n>       copy of a ConfigMap, Secret or projected volume, shared by containers of the pod
//! /dev/boxlite/<id>.<n>         node of a loop device: a host block device, backed by b/<number> of the share
//! /l/<n>                        a layer, mounted once for all containers that use it
//! ```

pub(crate) mod blocks;
pub(crate) mod idmap;
mod implicit;
pub(crate) mod layers;
mod loops;
mod memory;
pub(crate) mod mirror;
pub(crate) mod mount_points;
mod overlay;
pub(crate) mod pod;
pub(crate) mod rootfs;
pub(crate) mod submount_pins;
pub(crate) mod usage;
pub(crate) mod volumes;

use std::io;

/// An error in setting up or removing a filesystem.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A mount failed.
    #[error("failed to mount {fstype} {origin} on {target}")]
    Mount {
        fstype: String,
        origin: String,
        target: String,
        #[source]
        source: io::Error,
    },
    /// An unmount failed.
    #[error("failed to unmount {target}")]
    Unmount {
        target: String,
        #[source]
        source: io::Error,
    },
    /// A file or directory operation failed.
    #[error("failed to {step} {path}")]
    Path {
        step: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    /// A path of the request is not a plain path below its base.
    #[error("invalid path {path:?}: not a plain path below {base}")]
    Escape { path: String, base: &'static str },
    /// The scratch disk does not exist.
    #[error("disk with serial {serial:?} not found; present: {present}")]
    NoDisk { serial: String, present: String },
    /// Owners of files on the share cannot be mapped.
    #[error(
        "root directory {path:?} cannot be used in a user namespace: owners of files on the share cannot be mapped"
    )]
    NotMapped { path: String },
    /// More layers than overlayfs supports.
    #[error("invalid number of layers: {count} (minimum 1, maximum {limit})")]
    TooManyLayers { count: usize, limit: usize },
}

impl StorageError {
    pub(crate) fn path(
        step: &'static str,
        path: impl AsRef<std::path::Path>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().display().to_string();
        move |source| Self::Path { step, path, source }
    }
}

fn mount_error(fstype: &str, origin: &str, target: &str, errno: nix::Error) -> StorageError {
    StorageError::Mount {
        fstype: fstype.to_owned(),
        origin: origin.to_owned(),
        target: target.to_owned(),
        source: errno.into(),
    }
}

/// Unmounts `target`. Succeeds if nothing is mounted there.
fn unmount(target: &std::path::Path, flags: nix::mount::MntFlags) -> Result<(), StorageError> {
    match nix::mount::umount2(target, flags) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => Ok(()),
        Err(errno) => Err(StorageError::Unmount {
            target: target.display().to_string(),
            source: errno.into(),
        }),
    }
}

/// Maximum number of entries of a root directory that are opened.
const MAX_PREFAULTED_ENTRIES: usize = 256;

/// Opens every volume of the share that `spec` mounts. If the host announces its mounts (libkrun does), each is a
/// submount that appears when it is first entered; entered here, in the agent's mount namespace, it is inherited by
/// all containers. If a container entered it first, the submount and its caches would belong to that container only,
/// and its end would race with files being closed: the kernel (6.12) has a bug there, "Busy inodes after unmount of
/// virtiofs". Blocks.
pub(crate) fn prefault_submounts(spec: &oci_spec::runtime::Spec) {
    let sources = spec
        .mounts()
        .iter()
        .flatten()
        .filter_map(|m| m.source().as_ref());
    for source in sources.filter(|s| s.starts_with(boxlite_proto::names::GUEST_SHARE)) {
        // A file is not a submount; an invalid path is reported by the mount itself.
        let _ = std::fs::read_dir(source);
    }
}

/// Returns whether a mount of `spec` receives mounts that the host makes later.
pub(crate) fn follows_host(spec: &oci_spec::runtime::Spec) -> bool {
    let follows = |mount: &oci_spec::runtime::Mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        options.iter().any(|option| option == "rslave")
    };
    spec.mounts().iter().flatten().any(follows)
}

/// Waits until the host has answered all earlier requests to the share. Files are released in the background, and a
/// mount namespace that ends before that ends its submounts too early (see [`prefault_submounts`]); a single request
/// that is answered in order is enough. Blocks.
pub(crate) fn sync_share() {
    let _ = rustix::fs::statfs(boxlite_proto::names::GUEST_SHARE);
}

/// Opens a root directory on the share and the mounts directly below it, like [`prefault_submounts`]. Blocks.
fn prefault_root(directory: &std::path::Path) {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    for entry in entries.take(MAX_PREFAULTED_ENTRIES).flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = std::fs::read_dir(entry.path());
        }
    }
}
