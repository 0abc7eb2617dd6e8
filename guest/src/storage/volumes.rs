//! Volumes created by the guest: image volumes and tmpfs. [`Volumes::mount`] mounts them and replaces their entries
//! in the spec by bind mounts; the host's volumes are bind mounts of the share already.
//!
//! Paths inside an image are untrusted; the kernel resolves them within the image's root.

use super::idmap::Mapped;
use super::layers::Layers;
use super::overlay::stack;
use super::{StorageError, mount_error};
use boxlite_proto::names::{
    IMAGE_MOUNT, IMAGE_SUB_PATH_STEP, LAYER_OPTION, MEMORY_MOUNT, MOUNT_FLAGS, SUB_PATH_OPTION,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Directory of a container's image volumes below its bundle.
const IMAGES: &str = "volumes";
/// Directory of the tmpfs shared by containers of the pod, by name. They exist until the VM ends, like the pod's
/// /dev/shm.
const MEMORY: &str = "/run/boxlite/memory";
/// Empty lower directory; overlayfs requires at least two, and an image may have a single layer.
const EMPTY: &str = "/run/boxlite/empty";

/// Mounts made for one container.
#[derive(Debug, Default)]
pub struct Volumes {
    mounts: Vec<PathBuf>,
    layers: Vec<String>,
}

impl Volumes {
    /// Mounts the volumes of these types in `spec` below `bundle`, image volumes with the owners of the container's user
    /// namespace. After an error, `self` holds what was mounted, for
    /// [`Self::take_down`].
    ///
    /// # Errors
    /// If a layer or path of the image does not exist, or a mount fails.
    pub fn mount(
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
                Some(MEMORY_MOUNT) => (memory(mount)?, "rw"),
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
    pub fn take_down(&self, layers: &Layers) -> Result<(), StorageError> {
        for target in self.mounts.iter().rev() {
            match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
                Err(errno) => {
                    return Err(StorageError::Unmount {
                        target: target.display().to_string(),
                        source: errno.into(),
                    });
                }
            }
        }
        for layer in &self.layers {
            layers.release(layer);
        }
        Ok(())
    }
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

/// Returns the mount point of the tmpfs with that name, mounting it on first use.
fn memory(request: &Mount) -> Result<PathBuf, StorageError> {
    let name = request.source().as_deref().unwrap_or(Path::new(""));
    let text = name.to_string_lossy();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(StorageError::Escape {
            path: text.into_owned(),
            base: MEMORY,
        });
    }
    let target = Path::new(MEMORY).join(name);
    if target.exists() {
        return Ok(target);
    }
    let sizes = request.options().iter().flatten();
    let size = sizes
        .filter_map(|option| option.strip_prefix("size="))
        .find_map(|size| size.parse::<u64>().ok())
        .unwrap_or(super::pod::DEFAULT_SHM_BYTES);
    fs::create_dir_all(&target).map_err(StorageError::path("create directory", &target))?;
    let options = format!("mode=1777,size={size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let made = mount(
        Some("tmpfs"),
        &target,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    );
    made.map_err(|errno| {
        // Otherwise the next caller would use the plain directory.
        let _ = fs::remove_dir(&target);
        mount_error("tmpfs", "memory", &target.display().to_string(), errno)
    })?;
    Ok(target)
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

    #[test]
    fn memory_rejects_names_with_separators() {
        for name in ["", "..", "a/b", "/etc"] {
            let mut request = Mount::default();
            request.set_source(Some(name.into()));
            assert!(memory(&request).is_err(), "{name:?}");
        }
    }
}
