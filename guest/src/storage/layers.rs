//! Image layers: each EROFS file of the share is mounted once, however many containers use it.
//!
//! Layer files are untrusted, so they are mounted read-only and with nodev (containers get devices from their own
//! /dev).

use super::StorageError;
use boxlite_proto::names;
use boxlite_sys::sync::Mutex;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

/// Parent of the layers' mount points. The names are short because overlayfs options once had to fit one page, and
/// for readability of /proc/mounts.
const LAYERS: &str = "/l";

#[derive(Debug)]
struct Mounted {
    target: PathBuf,
    holders: u32,
}

#[derive(Debug, Default)]
struct Table {
    mounted: HashMap<PathBuf, Mounted>,
    next: u64,
}

/// The mounted layers.
#[derive(Debug, Default)]
pub(crate) struct Layers {
    table: Mutex<Table>,
}

impl Layers {
    /// Mounts the layer file at `path` below the share, or reuses its mount. Returns the mount point. Each call must
    /// be paired with [`Self::release`]. Blocks.
    pub(crate) fn hold(&self, path: &str) -> Result<PathBuf, StorageError> {
        let source = below_share(path)?;
        let mut table = self.table.lock();
        if let Some(mounted) = table.mounted.get_mut(&source) {
            mounted.holders += 1;
            return Ok(mounted.target.clone());
        }
        let target = Path::new(LAYERS).join(table.next.to_string());
        table.next += 1;
        std::fs::create_dir_all(&target)
            .map_err(StorageError::path("create directory", &target))?;
        if let Err(error) = mount_erofs(&source, &target) {
            let _ = std::fs::remove_dir(&target);
            return Err(error);
        }
        table.mounted.insert(
            source,
            Mounted {
                target: target.clone(),
                holders: 1,
            },
        );
        Ok(target)
    }

    /// Releases a layer; the last release unmounts it. Blocks.
    pub(crate) fn release(&self, path: &str) {
        let Ok(source) = below_share(path) else {
            return;
        };
        let mut table = self.table.lock();
        let Some(mounted) = table.mounted.get_mut(&source) else {
            return;
        };
        mounted.holders -= 1;
        if mounted.holders == 0 {
            // Detached, because an exiting mount namespace may still hold the overlay on top of it.
            let _ = umount2(&mounted.target, MntFlags::MNT_DETACH);
            let _ = std::fs::remove_dir(&mounted.target);
            table.mounted.remove(&source);
        }
    }
}

/// Mounts an EROFS file without a loop device (possible since kernel 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE).
fn mount_erofs(source: &Path, target: &Path) -> Result<(), StorageError> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    mount(Some(source), target, Some("erofs"), flags, None::<&str>).map_err(|errno| {
        StorageError::Mount {
            fstype: "erofs".to_owned(),
            origin: source.display().to_string(),
            target: target.display().to_string(),
            source: errno.into(),
        }
    })
}

/// Returns the absolute path of a request's path below the share, which must be relative and without `..`.
pub(crate) fn below_share(path: &str) -> Result<PathBuf, StorageError> {
    let relative = Path::new(path);
    let plain = !path.is_empty()
        && relative
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
    if !plain {
        return Err(StorageError::Escape {
            path: path.to_owned(),
            base: names::GUEST_SHARE,
        });
    }
    Ok(Path::new(names::GUEST_SHARE).join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_share_accepts_only_plain_relative_paths() {
        assert_eq!(
            below_share("l/0.erofs").unwrap(),
            Path::new("/run/boxlite/share/l/0.erofs")
        );
        for path in ["", "/etc", "../x", "l/../../x", "./l"] {
            assert!(below_share(path).is_err(), "{path:?}");
        }
    }
}
