//! Directories that a layer needs but does not describe: [`adopt`] gives them the owner, mode and time that a lower layer
//! gives them.
//!
//! A tar stream may contain `srv/x` without an entry for `srv`. containerd unpacks layers on top of each other, so `srv`
//! keeps the attributes of the lower layer. Here each layer is a separate file system, and overlayfs shows the
//! attributes of the topmost directory. The EROFS writer therefore marks such directories ([`MARK`]), and the roots of
//! layers that have any. Called by `rootfs` once the overlay is mounted; must not follow links of the image.

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, lgetxattr, lremovexattr, utimensat};
use rustix::io::Errno;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

/// Attribute of directories without an entry; `erofs` writes it.
const MARK: &str = "trusted.boxlite.implicit";
/// Maximum number of directories that are compared per container, to bound the time of a start.
const MAX_DIRECTORIES: usize = 100_000;

/// Corrects the marked directories of `root`, the overlay of `layers` (lowest first).
pub(crate) fn adopt(layers: &[PathBuf], root: &Path) -> io::Result<()> {
    let mut budget = MAX_DIRECTORIES;
    for at in (1..layers.len()).rev() {
        if has_mark(&layers[at]) {
            let (layer, below) = (&layers[at], &layers[..at]);
            let mut walk = Walk {
                layer,
                below,
                root,
                budget: &mut budget,
            };
            walk.visit(Path::new(""))?;
        }
    }
    Ok(())
}

struct Walk<'a> {
    layer: &'a Path,
    /// The layers below it, lowest first.
    below: &'a [PathBuf],
    /// The overlay.
    root: &'a Path,
    /// Number of directories that may still be compared.
    budget: &'a mut usize,
}

impl Walk<'_> {
    /// Visits the directories of `directory` that lower layers have, too.
    fn visit(&mut self, directory: &Path) -> io::Result<()> {
        for entry in fs::read_dir(self.layer.join(directory))? {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let path = directory.join(entry.file_name());
            let Some(left) = self.budget.checked_sub(1) else {
                tracing::warn!(
                    limit = MAX_DIRECTORIES,
                    "too many directories in the layers, some keep default attributes"
                );
                return Ok(());
            };
            *self.budget = left;
            let merged = self.root.join(&path);
            let known = |layer: &PathBuf| matches!(find(layer, &path), Found::Directory(_));
            if !fs::symlink_metadata(&merged).is_ok_and(|merged| merged.is_dir())
                || !self.below.iter().any(known)
            {
                continue;
            }
            // The overlay shows the mark if the topmost layer with the directory does not describe it.
            if has_mark(&merged)
                && let Some(original) = described(self.below, &path)?
            {
                copy(&original, &merged)?;
                match lremovexattr(&merged, MARK) {
                    // A file system without trusted attributes has not kept it.
                    Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            self.visit(&path)?;
        }
        Ok(())
    }
}

/// A name in a layer, without following links.
enum Found {
    Directory(PathBuf),
    /// Something else, such as a whiteout, at the name or one of its parents.
    Other,
    Nothing,
}

fn find(layer: &Path, path: &Path) -> Found {
    let mut here = layer.to_owned();
    for part in path {
        here.push(part);
        match fs::symlink_metadata(&here) {
            Ok(found) if found.is_dir() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Found::Nothing,
            _ => return Found::Other,
        }
    }
    Found::Directory(here)
}

/// Returns the attributes of the directory in the topmost layer that describes it, unless a layer above has something
/// else. Opaque directories take them from below, too, as in containerd.
fn described(layers: &[PathBuf], path: &Path) -> io::Result<Option<Metadata>> {
    for layer in layers.iter().rev() {
        match find(layer, path) {
            Found::Directory(found) if !has_mark(&found) => {
                return fs::symlink_metadata(found).map(Some);
            }
            Found::Other => return Ok(None),
            Found::Directory(_) | Found::Nothing => {}
        }
    }
    Ok(None)
}

fn copy(original: &Metadata, to: &Path) -> io::Result<()> {
    lchown(to, Some(original.uid()), Some(original.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(original.mode() & 0o7777))?;
    let time = Timespec {
        tv_sec: original.mtime(),
        tv_nsec: original.mtime_nsec() as _,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn has_mark(path: &Path) -> bool {
    lgetxattr(path, MARK, &mut [0_u8; 8][..]).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers as the EROFS writer makes them, on a file system with trusted attributes.
    #[test]
    fn described_finds_topmost_visible_entry() {
        let dir = tempfile::tempdir().unwrap();
        let layers: Vec<PathBuf> = ["0", "1", "2"].iter().map(|n| dir.path().join(n)).collect();
        let make = |layer: usize, path: &str, mode: u32, marks: &[&str]| {
            let path = layers[layer].join(path);
            fs::create_dir_all(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            marks.iter().all(|mark| {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::lsetxattr(&path, *mark, b"y", flags).is_ok()
            })
        };
        make(0, "srv", 0o1777, &[]);
        make(0, "srv/a", 0o700, &[]);
        make(0, "gone/x", 0o711, &[]);
        fs::create_dir_all(&layers[1]).unwrap();
        fs::write(layers[1].join("gone"), b"").unwrap();
        fs::create_dir_all(&layers[2]).unwrap();
        let mode = |path: &str| {
            let found = described(&layers, Path::new(path)).unwrap();
            found.map(|found| found.mode() & 0o7777)
        };
        assert_eq!(mode("srv"), Some(0o1777));
        assert_eq!(mode("srv/a"), Some(0o700));
        assert_eq!(mode("gone/x"), None, "hidden by a file");
        assert_eq!(mode("none"), None);
        // Needs root.
        if make(1, "srv", 0o755, &[MARK]) {
            assert_eq!(mode("srv"), Some(0o1777), "the mark is passed");
        }
    }
}
