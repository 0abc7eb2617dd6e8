//! Volumes created by the guest: mounted images, tmpfs, and `VOLUME` paths of the container's image. [`Volumes`] mounts
//! them and replaces their entries in the spec by bind mounts; the host's volumes are bind mounts of the share already.
//!
//! Paths inside an image are untrusted; the kernel resolves them within the image's root.

use super::idmap::Mapped;
use super::layers::Layers;
use super::memory;
use super::overlay::stack;
use super::{StorageError, mount_error, mount_points, unmount};
use boxlite_proto::names::{
    IDMAP_OPTION, IMAGE_MOUNT, IMAGE_SUB_PATH_STEP, IMAGE_VOLUME_MOUNT, LAYER_OPTION, MEMORY_MOUNT,
    MOUNT_FLAGS, SUB_PATH_OPTION,
};
use nix::mount::{MntFlags, MsFlags, mount};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Directory of a container's image and memory volumes below its bundle.
const IMAGES: &str = "volumes";
/// Empty lower directory; overlayfs requires at least two, and an image may have a single layer.
const EMPTY: &str = "/run/boxlite/empty";

/// Mounts made for one container.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    mounts: Vec<PathBuf>,
    layers: Vec<String>,
}

impl Volumes {
    /// Mounts the volumes of these types in `spec` below `bundle`, image volumes with the owners of the container's user
    /// namespace. After an error, `self` holds the existing mounts, for [`Self::take_down`].
    ///
    /// # Errors
    /// If a layer or path of the image does not exist, or a mount fails.
    pub(crate) fn mount(
        &mut self,
        spec: &mut Spec,
        bundle: &Path,
        layers: &Layers,
        user_namespace: Option<BorrowedFd<'_>>,
    ) -> Result<(), StorageError> {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (number, mount) in mounts.iter_mut().enumerate() {
            let (source, access) = match mount.typ().as_deref() {
                Some(IMAGE_MOUNT) => {
                    let target = bundle.join(IMAGES).join(number.to_string());
                    (self.image(mount, target, layers, user_namespace)?, "ro")
                }
                Some(MEMORY_MOUNT) => {
                    let target = bundle.join(IMAGES).join(number.to_string());
                    let source = self.memory(mount, target, user_namespace)?;
                    (source, if is_read_only(mount) { "ro" } else { "rw" })
                }
                _ => continue,
            };
            let mut options = ["rbind", "rprivate", access].map(str::to_owned).to_vec();
            let flags = mount.options().clone().unwrap_or_default().into_iter();
            options.extend(flags.filter(|option| MOUNT_FLAGS.contains(&option.as_str())));
            mount
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(source))
                .set_options(Some(options));
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }

    /// Binds the directories that `spec` mounts from the container's root filesystem at `root` (the image's `VOLUME`
    /// paths) below `bundle`, and replaces their entries. Missing directories are created, in a user namespace for its root
    /// `owner`. Symlinks are resolved within the root, so no process may run in it yet.
    ///
    /// # Errors
    /// If a path is not a directory, is covered by /proc, or a system call fails.
    pub(crate) fn mount_image_volumes(
        &mut self,
        spec: &mut Spec,
        bundle: &Path,
        root: &Path,
        owner: Option<u32>,
    ) -> Result<(), StorageError> {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (number, mount) in mounts.iter_mut().enumerate() {
            if mount.typ().as_deref() != Some(IMAGE_VOLUME_MOUNT) {
                continue;
            }
            let path = mount.source().clone().unwrap_or_default();
            // As runc: otherwise the image would determine the contents of /proc.
            if mount.destination().starts_with("/proc") {
                return Err(StorageError::Escape {
                    path: path.display().to_string(),
                    base: "the root filesystem (it leads to /proc)",
                });
            }
            let opened = mount_points::open_directory(root, &path)
                .map_err(StorageError::path("open the image's volume", &path))?;
            let target = bundle.join(IMAGES).join(number.to_string());
            self.bind(&opened, &target)?;
            if let Some(owner) = owner {
                own(&target, owner).map_err(StorageError::path("chown", &path))?;
            }
            let options = ["rbind", "rprivate", "rw"].map(str::to_owned).to_vec();
            mount
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(target))
                .set_options(Some(options));
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }

    fn image(
        &mut self,
        request: &Mount,
        target: PathBuf,
        layers: &Layers,
        user_namespace: Option<BorrowedFd<'_>>,
    ) -> Result<PathBuf, StorageError> {
        let mut lower = Vec::new();
        fs::create_dir_all(EMPTY).map_err(StorageError::path("create directory", EMPTY))?;
        let mut sub_path = "";
        for option in request.options().iter().flatten() {
            if let Some(layer) = option.strip_prefix(LAYER_OPTION) {
                lower.push(layers.hold(layer)?);
                self.layers.push(layer.to_owned());
            } else if let Some(path) = option.strip_prefix(SUB_PATH_OPTION) {
                sub_path = path;
            }
        }
        fs::create_dir_all(&target).map_err(StorageError::path("create directory", &target))?;
        let views = target.with_extension("mapped");
        // Dropped once the overlay holds its own references.
        let mapped = match user_namespace {
            Some(namespace) => Mapped::mount_layers(&lower, &views, namespace)?,
            None => Vec::new(),
        };
        if !mapped.is_empty() {
            lower = mapped.iter().map(|layer| layer.path().to_owned()).collect();
        }
        lower.insert(0, PathBuf::from(EMPTY));
        stack(&lower, None, &target)?;
        self.mounts.push(target.clone());
        if sub_path.is_empty() {
            return Ok(target);
        }
        let part = find(&target, sub_path)?;
        let target = target.with_extension("part");
        self.bind(&part, &target)?;
        Ok(target)
    }

    /// Mounts the requested directory of a pod's tmpfs at `target`.
    fn memory(
        &mut self,
        request: &Mount,
        target: PathBuf,
        user_namespace: Option<BorrowedFd<'_>>,
    ) -> Result<PathBuf, StorageError> {
        let directory = memory::open(request)?;
        let mapped = request.options().iter().flatten();
        let mapped = mapped.into_iter().any(|option| option == IDMAP_OPTION);
        let Some(namespace) = user_namespace.filter(|_| mapped) else {
            self.bind(&directory, &target)?;
            return Ok(target);
        };
        fs::create_dir_all(&target).map_err(StorageError::path("create directory", &target))?;
        let origin = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        boxlite_sys::idmap::mount(&origin, &target, namespace, false)
            .map_err(StorageError::path("map the owners of", &target))?;
        self.mounts.push(target.clone());
        Ok(target)
    }

    /// Binds the opened file or directory to `target`, which is created.
    fn bind(&mut self, part: &OwnedFd, target: &Path) -> Result<(), StorageError> {
        let origin = PathBuf::from(format!("/proc/self/fd/{}", part.as_raw_fd()));
        let metadata = fs::metadata(&origin).map_err(StorageError::path("stat", target))?;
        let made = match metadata.is_dir() {
            true => fs::create_dir_all(target),
            false => File::create(target).map(drop),
        };
        made.map_err(StorageError::path("create", target))?;
        let none = None::<&str>;
        mount(Some(&origin), target, none, MsFlags::MS_BIND, none).map_err(|errno| {
            let (origin, target) = (origin.display().to_string(), target.display().to_string());
            mount_error("bind", &origin, &target, errno)
        })?;
        self.mounts.push(target.to_owned());
        Ok(())
    }

    /// Unmounts everything and releases the layers. Idempotent.
    pub(crate) fn take_down(&self, layers: &Layers) -> Result<(), StorageError> {
        for target in self.mounts.iter().rev() {
            unmount(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
        }
        for layer in &self.layers {
            layers.release(layer);
        }
        Ok(())
    }
}

/// Gives a directory that the agent has created to the root of a user namespace. Directories of the image are mapped.
fn own(directory: &Path, owner: u32) -> std::io::Result<()> {
    match fs::metadata(directory)?.uid() {
        0 => std::os::unix::fs::chown(directory, Some(owner), Some(owner)),
        _ => Ok(()),
    }
}

fn is_read_only(request: &Mount) -> bool {
    let mut options = request.options().iter().flatten();
    options.any(|option| option == "ro")
}

/// Opens a path of the image mounted at `root`; symlinks are resolved within it.
fn find(root: &Path, path: &str) -> Result<OwnedFd, StorageError> {
    let failed =
        |errno: rustix::io::Errno| StorageError::path(IMAGE_SUB_PATH_STEP, path)(errno.into());
    let root = File::open(root).map_err(StorageError::path("open", root))?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    openat2(&root, path, flags, Mode::empty(), resolve).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn find_stays_inside_the_image() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc/deep")).unwrap();
        fs::write(root.path().join("etc/deep/x"), "inside").unwrap();
        symlink("/etc/deep", root.path().join("absolute")).unwrap();
        symlink("../../../../etc", root.path().join("etc/up")).unwrap();
        let read = |path: &str| {
            let found = find(root.path(), path).unwrap();
            fs::read_to_string(format!("/proc/self/fd/{}", found.as_raw_fd())).unwrap()
        };
        for path in ["etc/deep/x", "absolute/x", "etc/up/deep/x"] {
            assert_eq!(read(path), "inside", "{path}");
        }
        let error = find(root.path(), "etc/nothing").unwrap_err();
        assert!(error.to_string().contains("etc/nothing"), "{error}");
    }
}
