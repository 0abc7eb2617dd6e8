//! Volumes that the guest makes itself: images shown read-only, and memory. [`Volumes::mount`] makes them and turns their
//! mounts in the spec into plain binds; volumes of the host are binds of the share already.
//!
//! A path inside an image is hostile: it is resolved by the kernel within the image's own root.

use super::layers::Layers;
use super::rootfs::stack;
use super::{StorageError, mount_error};
use boxlite_proto::names::{IMAGE_MOUNT, LAYER_OPTION, MEMORY_MOUNT, SUB_PATH_OPTION};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Below a container's bundle: its image volumes.
const IMAGES: &str = "volumes";
/// Below it: memory shared by containers of the pod, by name. Stays until the VM ends, like the pod's /dev/shm.
const MEMORY: &str = "/run/boxlite/memory";
/// overlayfs wants two directories at least, and an image may have one layer.
const EMPTY: &str = "/run/boxlite/empty";

/// What was mounted for one container.
#[derive(Debug, Default)]
pub struct Volumes {
    mounts: Vec<PathBuf>,
    layers: Vec<String>,
}

impl Volumes {
    /// Mounts what `spec` wants of these kinds below `bundle`. On an error what was made is in `self` all the same, for
    /// [`Self::take_down`].
    ///
    /// # Errors
    /// A layer or a part of the image that is not there, or a mount that the kernel refuses.
    pub fn mount(
        &mut self,
        spec: &mut Spec,
        bundle: &Path,
        layers: &Layers,
    ) -> Result<(), StorageError> {
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (number, mount) in mounts.iter_mut().enumerate() {
            let (source, access) = match mount.typ().as_deref() {
                Some(IMAGE_MOUNT) => {
                    let place = bundle.join(IMAGES).join(number.to_string());
                    (self.image(mount, place, layers)?, "ro")
                }
                Some(MEMORY_MOUNT) => (memory(mount)?, "rw"),
                _ => continue,
            };
            let options = ["rbind", "rprivate", access].map(str::to_owned);
            mount
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(source))
                .set_options(Some(options.to_vec()));
        }
        spec.set_mounts(Some(mounts));
        Ok(())
    }

    fn image(
        &mut self,
        wish: &Mount,
        place: PathBuf,
        layers: &Layers,
    ) -> Result<PathBuf, StorageError> {
        let mut lower = vec![PathBuf::from(EMPTY)];
        fs::create_dir_all(EMPTY).map_err(StorageError::path("mkdir", EMPTY))?;
        let mut sub_path = "";
        for option in wish.options().iter().flatten() {
            if let Some(layer) = option.strip_prefix(LAYER_OPTION) {
                lower.push(layers.hold(layer)?);
                self.layers.push(layer.to_owned());
            } else if let Some(path) = option.strip_prefix(SUB_PATH_OPTION) {
                sub_path = path;
            }
        }
        fs::create_dir_all(&place).map_err(StorageError::path("mkdir", &place))?;
        stack(&lower, None, &place)?;
        self.mounts.push(place.clone());
        if sub_path.is_empty() {
            return Ok(place);
        }
        let part = find(&place, sub_path)?;
        let shown = place.with_extension("part");
        self.show(&part, &shown)?;
        Ok(shown)
    }

    /// Binds what was opened to `place`, which is made.
    fn show(&mut self, part: &OwnedFd, place: &Path) -> Result<(), StorageError> {
        let origin = PathBuf::from(format!("/proc/self/fd/{}", part.as_raw_fd()));
        let metadata = fs::metadata(&origin).map_err(StorageError::path("look at", place))?;
        let made = match metadata.is_dir() {
            true => fs::create_dir_all(place),
            false => File::create(place).map(drop),
        };
        made.map_err(StorageError::path("create", place))?;
        let none = None::<&str>;
        mount(Some(&origin), place, none, MsFlags::MS_BIND, none).map_err(|errno| {
            let (origin, place) = (origin.display().to_string(), place.display().to_string());
            mount_error("bind", &origin, &place, errno)
        })?;
        self.mounts.push(place.to_owned());
        Ok(())
    }

    /// Unmounts everything and gives the layers up. Succeeds on what is gone.
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

/// Opens a path of the image whose tree is at `root`; links lead nowhere outside of it.
fn find(root: &Path, path: &str) -> Result<OwnedFd, StorageError> {
    let failed = |errno: rustix::io::Errno| {
        StorageError::path("find in the image the subpath", path)(errno.into())
    };
    let root = File::open(root).map_err(StorageError::path("open", root))?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    openat2(&root, path, flags, Mode::empty(), resolve).map_err(failed)
}

/// The tmpfs of this name, made by its first user.
fn memory(wish: &Mount) -> Result<PathBuf, StorageError> {
    let name = wish.source().as_deref().unwrap_or(Path::new(""));
    let text = name.to_string_lossy();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(StorageError::Escape {
            path: text.into_owned(),
            base: MEMORY,
        });
    }
    let place = Path::new(MEMORY).join(name);
    if place.exists() {
        return Ok(place);
    }
    let sizes = wish.options().iter().flatten();
    let size = sizes
        .filter_map(|option| option.strip_prefix("size="))
        .find_map(|size| size.parse::<u64>().ok())
        .unwrap_or(super::pod::DEFAULT_SHM);
    fs::create_dir_all(&place).map_err(StorageError::path("mkdir", &place))?;
    let options = format!("mode=1777,size={size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let made = mount(
        Some("tmpfs"),
        &place,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    );
    made.map_err(|errno| {
        // Or the next one would take the directory for the memory.
        let _ = fs::remove_dir(&place);
        mount_error("tmpfs", "memory", &place.display().to_string(), errno)
    })?;
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_path_in_an_image_stays_in_it() {
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
    fn memory_has_a_plain_name() {
        for name in ["", "..", "a/b", "/etc"] {
            let mut wish = Mount::default();
            wish.set_source(Some(name.into()));
            assert!(memory(&wish).is_err(), "{name:?}");
        }
    }
}
