//! A container's root file system: layers stacked by overlayfs under a writable layer on the scratch disk, or a whole
//! tree bound from the share.
//!
//! [`Rootfs::assemble`] makes it, [`Rootfs::take_down`] removes everything it made. Both block.

use super::StorageError;
use super::blocks::Blocks;
use super::idmap::Mapped;
use super::layers::{Layers, below_share};
use super::volumes::Volumes;
use boxlite_proto::boxlite::v1::{BlockDevice, Rootfs as Request};
use boxlite_proto::names;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};

/// Layers that can be stacked. The kernel takes 500; images stop at 127.
const LAYER_LIMIT: usize = 200;
/// Where containers' bundles are.
const BUNDLES: &str = "/run/boxlite/c";

/// Whose the files of a container in a user namespace are.
#[derive(Debug)]
pub struct Owners<'a> {
    /// The namespace.
    pub namespace: BorrowedFd<'a>,
    /// The VM's number of its root, user and group.
    pub root: u32,
}

/// A container's root file system and what it is made of.
#[derive(Debug)]
pub struct Rootfs {
    layers: Vec<String>,
    /// Holds `config.json` and the mount point.
    bundle: PathBuf,
    /// Holds upper and work; none for a bound tree.
    writable: Option<PathBuf>,
    volumes: Volumes,
    blocks: Blocks,
}

impl Rootfs {
    /// Stacks or binds what `request` names, for a container whose id is one plain path component.
    ///
    /// # Errors
    /// A path that leaves the share, or a mount the kernel refuses. What was made before is taken down again.
    pub fn assemble(
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
        fs::create_dir_all(&target).map_err(StorageError::path("mkdir", &target))?;
        if !request.directory.is_empty() {
            let directory = below_share(&request.directory)?;
            if owners.is_some() {
                return Err(StorageError::NotMapped {
                    path: request.directory.clone(),
                });
            }
            super::visit_root(&directory);
            bind(&directory, &target)?;
            return honour_setuid(&target);
        }
        if request.layers.is_empty() || request.layers.len() > LAYER_LIMIT {
            return Err(StorageError::TooManyLayers {
                count: request.layers.len(),
                limit: LAYER_LIMIT,
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
            fs::create_dir_all(&path).map_err(StorageError::path("mkdir", &path))?;
            if let Some(owners) = owners {
                std::os::unix::fs::chown(&path, Some(owners.root), Some(owners.root))
                    .map_err(StorageError::path("chown", &path))?;
            }
        }
        // Gone from here once the overlay holds them.
        let mapped = match owners {
            Some(owners) => self.map_layers(&lower, owners)?,
            None => Vec::new(),
        };
        if !mapped.is_empty() {
            lower = mapped.iter().map(|layer| layer.path().to_owned()).collect();
        }
        stack(&lower, Some(&writable), &target)
    }

    /// Mounts the volumes that the guest makes itself, and makes plain binds of them in `spec`. They go with the rootfs.
    ///
    /// # Errors
    /// As [`Volumes::mount`].
    pub fn mount_volumes(&mut self, spec: &mut Spec, layers: &Layers) -> Result<(), StorageError> {
        self.volumes.mount(spec, &self.bundle, layers)
    }

    /// Makes the host's block devices for the container `id`, and adds them to `spec`. They go with the rootfs.
    ///
    /// # Errors
    /// As [`Blocks::make`].
    pub fn make_blocks(
        &mut self,
        id: &str,
        wanted: &[BlockDevice],
        outside: impl Fn(u32) -> u32,
        spec: &mut Spec,
    ) -> Result<(), StorageError> {
        self.blocks.make(id, wanted, outside, spec)
    }

    /// The layers as the owners' namespace sees them.
    fn map_layers(
        &self,
        lower: &[PathBuf],
        owners: &Owners<'_>,
    ) -> Result<Vec<Mapped>, StorageError> {
        let mut mapped = Vec::new();
        for (index, layer) in lower.iter().enumerate() {
            let target = self.bundle.join(format!("l{index}"));
            fs::create_dir_all(&target).map_err(StorageError::path("mkdir", &target))?;
            let view = Mapped::mount(layer, &target, owners.namespace).map_err(|source| {
                StorageError::Mount {
                    fstype: "mapped layer".to_owned(),
                    origin: layer.display().to_string(),
                    target: target.display().to_string(),
                    source,
                }
            })?;
            mapped.push(view);
        }
        Ok(mapped)
    }

    /// The mounted tree.
    pub fn path(&self) -> PathBuf {
        self.bundle.join("rootfs")
    }

    /// The directory for `config.json` beside it.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// The writable layer's directory.
    pub fn upper(&self) -> Option<PathBuf> {
        self.writable
            .as_ref()
            .map(|writable| writable.join("upper"))
    }

    /// Unmounts and removes everything. Succeeds on what is gone.
    pub fn take_down(&self, layers: &Layers) -> Result<(), StorageError> {
        self.blocks.take_down();
        self.volumes.take_down(layers)?;
        let target = self.path();
        match umount2(&target, MntFlags::MNT_DETACH) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(errno) => {
                return Err(StorageError::Unmount {
                    target: target.display().to_string(),
                    source: errno.into(),
                });
            }
        }
        for layer in &self.layers {
            layers.release(layer);
        }
        // remove_dir_all follows no links.
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

/// Makes a directory and its parents inside the tree at `root`, following links within it only.
pub fn make_directory(root: &Path, path: &Path) -> io::Result<()> {
    let root = fs::File::open(root)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let mut done = PathBuf::new();
    for part in path.components() {
        let Component::Normal(name) = part else {
            continue;
        };
        let parent = openat2(
            root.as_fd(),
            if done.as_os_str().is_empty() {
                Path::new(".")
            } else {
                &done
            },
            flags,
            Mode::empty(),
            resolve,
        )?;
        done.push(name);
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
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

/// Lets setuid programs and file capabilities count in a root file system that comes through the share, which is mounted
/// without: as they do in one that is stacked here.
fn honour_setuid(target: &Path) -> Result<(), StorageError> {
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

/// Stacks `lower`, lowest first, at `target`: under the upper layer in `writable`, or to be read only.
pub(super) fn stack(
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

/// Stacks `lower`, lowest first. The layers are handed over one by one: in one string their number would be limited by
/// the page the old mount call copies.
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
        // The writable layer doesn't outlive the pod, so a container's fsync needs no disk.
        fsconfig_set_flag(&context, "volatile")?;
        attributes = MountAttrFlags::empty();
    }
    fsconfig_create(&context)?;
    let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(
        &tree,
        "",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_inside_the_root_only() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
        make_directory(root.path(), Path::new("/a/b/c")).unwrap();
        assert!(root.path().join("a/b/c").is_dir());
        assert!(make_directory(root.path(), Path::new("/link/x")).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        make_directory(root.path(), Path::new("/a/../../b")).unwrap();
    }
}
