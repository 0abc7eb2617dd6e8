//! Image layers: each EROFS file of the share is mounted once, however many containers stack it.
//!
//! The file on the share is trusted as little as what made it: the mount is read-only, without devices taking effect in
//! the agent's own tree (containers get their devices from their own /dev).

use super::StorageError;
use boxlite_proto::names;
use boxlite_sys::sync::Mutex;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

/// Below it the layers are mounted, under short names: overlayfs's options once had to fit one page, and short names are
/// easier to read in /proc/mounts.
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

/// The layers that are mounted.
#[derive(Debug, Default)]
pub struct Layers {
    table: Mutex<Table>,
}

impl Layers {
    /// Mounts the layer file at `path` below the share, or takes the mount that is there. Answers the mount point. Pair
    /// with [`Self::release`]. Blocks.
    pub fn hold(&self, path: &str) -> Result<PathBuf, StorageError> {
        let source = below_share(path)?;
        let mut table = self.table.lock();
        if let Some(mounted) = table.mounted.get_mut(&source) {
            mounted.holders += 1;
            return Ok(mounted.target.clone());
        }
        let target = Path::new(LAYERS).join(table.next.to_string());
        table.next += 1;
        std::fs::create_dir_all(&target).map_err(StorageError::path("mkdir", &target))?;
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

    /// Gives a layer up; the last holder unmounts it. Blocks.
    pub fn release(&self, path: &str) {
        let Ok(source) = below_share(path) else {
            return;
        };
        let mut table = self.table.lock();
        let Some(mounted) = table.mounted.get_mut(&source) else {
            return;
        };
        mounted.holders -= 1;
        if mounted.holders == 0 {
            // Detached: a dying mount namespace may hold the overlay on top a moment longer.
            let _ = umount2(&mounted.target, MntFlags::MNT_DETACH);
            let _ = std::fs::remove_dir(&mounted.target);
            table.mounted.remove(&source);
        }
    }
}

/// The kernel mounts an EROFS file without a loop device (since 6.12, CONFIG_EROFS_FS_BACKED_BY_FILE).
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

/// A path of a request as one below the share: relative, and without `..`.
pub fn below_share(path: &str) -> Result<PathBuf, StorageError> {
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
    fn only_plain_paths_are_below_the_share() {
        assert_eq!(
            below_share("l/0.erofs").unwrap(),
            Path::new("/run/boxlite/share/l/0.erofs")
        );
        for path in ["", "/etc", "../x", "l/../../x", "./l"] {
            assert!(below_share(path).is_err(), "{path:?}");
        }
    }
}
