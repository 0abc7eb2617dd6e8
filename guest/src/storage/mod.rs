//! File systems of the pod: the virtiofs share, the scratch disk, image layers, and containers' root file systems.
//!
//! Everything here blocks in the kernel and is called through `spawn_blocking`. What lies in a layer is hostile: nothing
//! here follows a path inside one.
//!
//! ```text
//! /run/boxlite/share            virtiofs: l/*.erofs, m/<container>/<n>, r/<container>
//! /run/boxlite/scratch          ext4 on virtio-blk, or a tmpfs
//! /run/boxlite/scratch/c/<id>/  upper and work of a container's overlay
//! /run/boxlite/c/<id>/          bundle: config.json, rootfs, volumes/<n>: images mounted as volumes
//! /run/boxlite/memory/<name>    memory that containers mount at /dev/shm
//! /dev/boxlite/<id>.<n>         node of a loop device: a block device of the host, by a file b/<number> of the share
//! /l/<n>                        a layer, mounted once for all containers that have it
//! ```

pub mod blocks;
pub mod idmap;
pub mod layers;
mod loops;
pub mod pins;
pub mod pod;
pub mod rootfs;
pub mod usage;
pub mod volumes;

use std::io;

/// What of a file system could not be set up or taken down.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A mount was refused.
    #[error("mount {fstype} {origin} on {target}")]
    Mount {
        fstype: String,
        origin: String,
        target: String,
        #[source]
        source: io::Error,
    },
    /// An unmount was refused.
    #[error("unmount {target}")]
    Unmount {
        target: String,
        #[source]
        source: io::Error,
    },
    /// A directory could not be made or removed, a file not written.
    #[error("{step} {path}")]
    Path {
        step: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    /// A path of the request leaves the place it must be in, or is no plain path.
    #[error("path {path:?} is not a plain path below {base}")]
    Escape { path: String, base: &'static str },
    /// The scratch disk isn't there.
    #[error("no disk with serial {serial:?}; there are: {present}")]
    NoDisk { serial: String, present: String },
    /// A tree of the share has the owners it has.
    #[error(
        "root directory {path:?}: owners of files on the share cannot be mapped, which a user namespace needs"
    )]
    NotMapped { path: String },
    /// More layers than overlayfs stacks.
    #[error("{count} layers, and at most {limit} can be stacked")]
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

/// Most entries of a root directory that are looked into.
const VISIT_LIMIT: usize = 256;

/// Looks into every volume of the share that `spec` mounts. Where the host announces its mounts (libkrun does), each is a
/// submount that comes up where it is first entered: here, in the agent's mount namespace, all containers inherit the
/// same one. Entered by a container, it would be that container's own, with caches of its own, and its end would race
/// with files being closed: the kernel (6.12) has a BUG there, "Busy inodes after unmount of virtiofs". Blocks.
pub fn visit_volumes(spec: &oci_spec::runtime::Spec) {
    let sources = spec
        .mounts()
        .iter()
        .flatten()
        .filter_map(|m| m.source().as_ref());
    for source in sources.filter(|s| s.starts_with(boxlite_proto::names::GUEST_SHARE)) {
        // A single file is no submount; what is wrong with a path the mount itself will say.
        let _ = std::fs::read_dir(source);
    }
}

/// Whether a mount of `spec` gets mounts that the host makes later.
pub fn follows_host(spec: &oci_spec::runtime::Spec) -> bool {
    let follows = |mount: &oci_spec::runtime::Mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        options.iter().any(|option| option == "rslave")
    };
    spec.mounts().iter().flatten().any(follows)
}

/// Returns when the host has answered everything that was asked of the share before. Files are released in the background,
/// and a mount namespace that ends meanwhile ends its submounts too early (see [`visit_volumes`]); one question that is
/// answered in turn is enough. Blocks.
pub fn settle_share() {
    let _ = rustix::fs::statfs(boxlite_proto::names::GUEST_SHARE);
}

/// The same for a directory that is a whole root, and what is mounted directly below it. Blocks.
fn visit_root(directory: &std::path::Path) {
    let entries = std::fs::read_dir(directory).into_iter().flatten();
    for entry in entries.take(VISIT_LIMIT).flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = std::fs::read_dir(entry.path());
        }
    }
}
