//! What the mounts of containerd's snapshotters are made of: its EROFS snapshotter mounts each layer on the host and gives
//! an overlay of them, and the guest is better served with the layer files themselves.
//!
//! Looks only. Putting layers into the share is [`super::rootfs`]'s.

use containerd_shim_protos::api::Mount;
use nix::sys::statfs::{FsType, statfs};
use std::path::{Path, PathBuf};

/// Name of a layer's file beside the directory it is mounted at; the EROFS snapshotter's documented layout.
const LAYER_FILE: &str = "layer.erofs";
/// EROFS_SUPER_MAGIC_V1.
const EROFS_MAGIC: u32 = 0xE0F5_E1E2;

/// The layer files of an overlay whose every lower directory is a mounted EROFS layer, lowest first. None: anything else.
/// The writable layer is the guest's own then, on the pod's scratch disk; the snapshot's upper directory stays empty.
pub fn erofs_layers(mount: &Mount) -> Option<Vec<PathBuf>> {
    layers_of(mount, |dir| {
        statfs(dir).is_ok_and(|about| is_erofs(about.filesystem_type()))
    })
}

fn is_erofs(kind: FsType) -> bool {
    // The kernel's number is 32 bits wide, the type that holds it signed on some systems.
    kind.0 as u32 == EROFS_MAGIC
}

fn layers_of(mount: &Mount, mounted: impl Fn(&Path) -> bool) -> Option<Vec<PathBuf>> {
    if mount.type_ != "overlay" {
        return None;
    }
    let lower = mount
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let mut files = lower
        .split(':')
        .map(|dir| {
            let dir = Path::new(dir);
            let file = dir.parent()?.join(LAYER_FILE);
            (file.is_file() && mounted(dir)).then_some(file)
        })
        .collect::<Option<Vec<_>>>()?;
    // overlayfs names the uppermost first.
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
    fn only_mounted_layers_with_their_files_are_handed_over() {
        let dir = tempfile::tempdir().expect("tempdir");
        let layer = |n: u32| {
            let fs = dir.path().join(n.to_string()).join("fs");
            std::fs::create_dir_all(&fs).expect("mkdir");
            fs
        };
        let dirs = [layer(2), layer(1)];
        assert_eq!(layers_of(&overlay(&dirs), |_| true), None, "no layer files");
        for fs in &dirs {
            std::fs::write(fs.with_file_name(LAYER_FILE), b"").expect("written");
        }
        let files = layers_of(&overlay(&dirs), |_| true).expect("layers");
        let names: Vec<_> = files
            .iter()
            .map(|file| file.parent().expect("dir").file_name().expect("name"))
            .collect();
        assert_eq!(names, ["1", "2"], "lowest first");
        assert_eq!(layers_of(&overlay(&dirs), |_| false), None, "not mounted");
    }
}
