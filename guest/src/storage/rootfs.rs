//! A container's root filesystem: an overlay of image layers with a writable layer on the scratch disk, or a
//! directory of the share.
//!
//! [`Rootfs::assemble`] creates it, [`Rootfs::take_down`] removes everything. Both block.

use super::blocks::Blocks;
use super::idmap::Mapped;
use super::layers::{Layers, below_share};
use super::overlay::stack;
use super::volumes::Volumes;
use super::{StorageError, unmount};
use boxlite_proto::boxlite::v1::{BlockDevice, Rootfs as Request};
use boxlite_proto::names;
use nix::mount::{MntFlags, MsFlags, mount};
use oci_spec::runtime::Spec;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// Maximum number of layers. The kernel supports 500; images have at most 127.
const MAX_LAYERS: usize = 200;
/// Directory of the containers' bundles.
const BUNDLES: &str = "/run/boxlite/c";

/// Owner mapping of a container in a user namespace.
#[derive(Debug)]
pub(crate) struct Owners<'a> {
    /// The user namespace.
    pub namespace: BorrowedFd<'a>,
    /// The VM's ID of the namespace's root user and group.
    pub root: u32,
}

/// A container's root filesystem and its parts.
#[derive(Debug)]
pub(crate) struct Rootfs {
    layers: Vec<String>,
    /// Directory of `config.json` and the mount point.
    bundle: PathBuf,
    /// Directory of upper and work; `None` for a bind-mounted tree.
    writable: Option<PathBuf>,
    volumes: Volumes,
    blocks: Blocks,
}

impl Rootfs {
    /// Mounts the root filesystem of `request` for a container whose id is one normal path component.
    ///
    /// # Errors
    /// If a path leaves the share or a mount fails. Earlier steps are undone.
    pub(crate) fn assemble(
        id: &str,
        request: &Request,
        layers: &Layers,
        owners: Option<&Owners<'_>>,
    ) -> Result<Self, StorageError> {
        let mut rootfs = Self {
            layers: Vec::new(),
            bundle: Path::new(BUNDLES).join(id),
            writable: None,
            volumes: Volumes::default(),
            blocks: Blocks::default(),
        };
        match rootfs.build(id, request, layers, owners) {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                let _ = rootfs.take_down(layers);
                Err(error)
            }
        }
    }

    fn build(
        &mut self,
        id: &str,
        request: &Request,
        layers: &Layers,
        owners: Option<&Owners<'_>>,
    ) -> Result<(), StorageError> {
        let target = self.path();
        fs::create_dir_all(&target).map_err(StorageError::path("create directory", &target))?;
        if !request.directory.is_empty() {
            let directory = below_share(&request.directory)?;
            if owners.is_some() {
                return Err(StorageError::NotMapped {
                    path: request.directory.clone(),
                });
            }
            super::prefault_root(&directory);
            bind(&directory, &target)?;
            return allow_setuid(&target);
        }
        if request.layers.is_empty() || request.layers.len() > MAX_LAYERS {
            return Err(StorageError::TooManyLayers {
                count: request.layers.len(),
                limit: MAX_LAYERS,
            });
        }
        let mut lower = Vec::new();
        for layer in &request.layers {
            lower.push(layers.hold(&layer.path)?);
            self.layers.push(layer.path.clone());
        }
        let writable = Path::new(names::GUEST_SCRATCH).join("c").join(id);
        self.writable = Some(writable.clone());
        for name in ["upper", "work"] {
            let path = writable.join(name);
            fs::create_dir_all(&path).map_err(StorageError::path("create directory", &path))?;
            if let Some(owners) = owners {
                std::os::unix::fs::chown(&path, Some(owners.root), Some(owners.root))
                    .map_err(StorageError::path("chown", &path))?;
            }
        }
        // Dropped once the overlay holds its own references.
        let mapped = match owners {
            Some(owners) => Mapped::mount_layers(&lower, &self.bundle, owners.namespace)?,
            None => Vec::new(),
        };
        if !mapped.is_empty() {
            lower = mapped.iter().map(|layer| layer.path().to_owned()).collect();
        }
        stack(&lower, Some(&writable), &target)?;
        super::implicit::adopt(&lower, &target).map_err(StorageError::path(
            "set the attributes of directories of",
            &target,
        ))
    }

    /// Mounts the volumes created by the guest and replaces them by binds in `spec`. They are removed with the root
    /// filesystem.
    ///
    /// # Errors
    /// As [`Volumes::mount`].
    pub(crate) fn mount_volumes(
        &mut self,
        spec: &mut Spec,
        layers: &Layers,
        owners: Option<&Owners<'_>>,
    ) -> Result<(), StorageError> {
        let user_namespace = owners.map(|owners| owners.namespace);
        self.volumes
            .mount(spec, &self.bundle, layers, user_namespace)
    }

    /// Mounts the `VOLUME` paths of the container's image and replaces them by binds in `spec`, as
    /// [`Rootfs::mount_volumes`] does. Called once the mount points are resolved.
    ///
    /// # Errors
    /// As [`Volumes::mount_image_volumes`].
    pub(crate) fn mount_image_volumes(
        &mut self,
        spec: &mut Spec,
        owners: Option<&Owners<'_>>,
    ) -> Result<(), StorageError> {
        let root = self.path();
        let owner = owners.map(|owners| owners.root);
        self.volumes
            .mount_image_volumes(spec, &self.bundle, &root, owner)
    }

    /// Creates the host's block devices for the container `id`, and adds them to `spec`. They are removed with the
    /// root filesystem.
    ///
    /// # Errors
    /// As [`Blocks::make`].
    pub(crate) fn make_blocks(
        &mut self,
        id: &str,
        requests: &[BlockDevice],
        outside: impl Fn(u32) -> u32,
        spec: &mut Spec,
    ) -> Result<(), StorageError> {
        self.blocks.make(id, requests, outside, spec)
    }

    /// Returns the mount point of the tree.
    pub(crate) fn path(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// Returns the bundle directory.
    pub(crate) fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Returns the directory of the writable layer.
    pub(crate) fn upper(&self) -> Option<PathBuf> {
        self.writable
            .as_ref()
            .map(|writable| writable.join("upper"))
    }

    /// Unmounts and removes everything. Idempotent.
    pub(crate) fn take_down(&self, layers: &Layers) -> Result<(), StorageError> {
        self.blocks.take_down();
        self.volumes.take_down(layers)?;
        unmount(&self.path(), MntFlags::MNT_DETACH)?;
        for layer in &self.layers {
            layers.release(layer);
        }
        // remove_dir_all does not follow symlinks.
        for path in self.writable.iter().chain([&self.bundle]) {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StorageError::path("remove", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn bind(source: &Path, target: &Path) -> Result<(), StorageError> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(|errno| StorageError::Mount {
        fstype: "bind".to_owned(),
        origin: source.display().to_string(),
        target: target.display().to_string(),
        source: errno.into(),
    })
}

/// Makes setuid programs and file capabilities effective in a root filesystem on the share, which is mounted with
/// nosuid, as they are in an overlay.
fn allow_setuid(target: &Path) -> Result<(), StorageError> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_NODEV;
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>).map_err(|errno| {
        StorageError::Mount {
            fstype: "remount".to_owned(),
            origin: "suid".to_owned(),
            target: target.display().to_string(),
            source: errno.into(),
        }
    })
}
