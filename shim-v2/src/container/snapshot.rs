//! Finds the layer files behind the mounts of containerd's snapshotters. The EROFS snapshotter (from 2.2 on with the mount
//! manager) mounts each layer on the host and returns an overlay of them; the guest mounts the layer files itself instead.
//!
//! Only inspects mounts; [`super::rootfs`] binds the files into the share.

use crate::share::mountinfo;
use containerd_shim_protos::api::Mount;
use nix::sys::statfs::{FsType, statfs};
use std::path::{Path, PathBuf};

/// Name of a layer file, which the EROFS snapshotter of 2.1 mounts beside it (documented layout).
const LAYER_FILE: &str = "layer.erofs";
/// EROFS_SUPER_MAGIC_V1.
const EROFS_MAGIC: u32 = 0xE0F5_E1E2;

/// Returns the layer files, lowest first, of an overlay all of whose lower directories are mounted EROFS layers; None for
/// any other mount. The guest's writable layer is on the pod's scratch disk; the snapshot's upper directory remains empty.
pub fn erofs_layers(mount: &Mount) -> Option<Vec<PathBuf>> {
    layers_of(mount, |dir| {
        let mounted = statfs(dir).is_ok_and(|about| is_erofs(about.filesystem_type()));
        if !mounted {
            return None;
        }
        let beside = dir.parent()?.join(LAYER_FILE);
        if beside.is_file() {
            return Some(beside);
        }
        let source = mountinfo::source(dir).ok()??;
        plain_layer(&source, |name| {
            std::fs::read_to_string(format!("/sys/class/block/{name}/loop/backing_file")).ok()
        })
    })
}

/// Returns the layer file behind a mount source: the file itself, or the `backing` file of a loop device. A merged index of
/// several files or a dm-verity device is not a layer.
fn plain_layer(source: &Path, backing: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let file = match source.parent() {
        Some(dir) if dir == Path::new("/dev") => {
            let text = backing(source.file_name()?.to_str()?)?;
            PathBuf::from(text.trim_end_matches('\n'))
        }
        _ => source.to_owned(),
    };
    let named = file.file_name().is_some_and(|name| name == LAYER_FILE);
    (named && file.is_file()).then_some(file)
}

fn is_erofs(kind: FsType) -> bool {
    // The magic number has 32 bits; the type that holds it is signed on some systems.
    kind.0 as u32 == EROFS_MAGIC
}

fn layers_of(mount: &Mount, file_of: impl Fn(&Path) -> Option<PathBuf>) -> Option<Vec<PathBuf>> {
    if mount.type_ != "overlay" {
        return None;
    }
    let lower = mount
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let mut files = lower
        .split(':')
        .map(|dir| file_of(Path::new(dir)))
        .collect::<Option<Vec<_>>>()?;
    // overlayfs lists the uppermost directory first.
    files.reverse();
    Some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn overlay(dirs: &[PathBuf]) -> Mount {
        let all: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        Mount {
            type_: "overlay".to_owned(),
            options: vec![
                "index=off".to_owned(),
                format!("lowerdir={}", all.join(":")),
            ],
            ..Default::default()
        }
    }

    #[test]
    fn layers_of_overlay_returns_files_lowest_first() {
        let dirs = ["/2/fs", "/1/fs"].map(PathBuf::from);
        let file = |dir: &Path| Some(dir.parent()?.join(LAYER_FILE));
        let files = layers_of(&overlay(&dirs), file).expect("layers");
        assert_eq!(
            files,
            ["/1/layer.erofs", "/2/layer.erofs"].map(PathBuf::from)
        );
        let one = |dir: &Path| (dir == dirs[0]).then(|| dir.to_owned());
        assert_eq!(
            layers_of(&overlay(&dirs), one),
            None,
            "one directory is not a layer"
        );
    }

    #[test]
    fn plain_layer_accepts_layer_file_or_its_loop_device() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (layer, index) = (dir.path().join(LAYER_FILE), dir.path().join("fsmeta.erofs"));
        for file in [&layer, &index] {
            std::fs::write(file, b"").expect("written");
        }
        let text = format!("{}\n", layer.display());
        let backing = |name: &str| (name == "loop7").then(|| text.clone());
        assert_eq!(plain_layer(&layer, backing), Some(layer.clone()));
        assert_eq!(
            plain_layer(Path::new("/dev/loop7"), backing),
            Some(layer.clone())
        );
        assert_eq!(plain_layer(Path::new("/dev/dm-1"), backing), None);
        assert_eq!(plain_layer(&index, backing), None);
        std::fs::remove_file(&layer).expect("removed");
        assert_eq!(plain_layer(&layer, backing), None, "deleted file");
    }
}
