//! Device nodes of a container beyond the standard ones: all of the VM's for a privileged one, else those it asked for.
//!
//! What the VM has stands in its own /dev (devtmpfs). Making the nodes is libcontainer's: with mknod, or in a user
//! namespace by binding them.

use super::ContainerError;
use boxlite_proto::names::{DEVICES_ANNOTATION, PRIVILEGED_ANNOTATION};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Spec};
use serde::Deserialize;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// Where the VM's devices are.
const DEV: &str = "/dev";
/// What of it a container has of its own.
const OWN: [&str; 7] = ["boxlite", "console", "fd", "mqueue", "ptmx", "pts", "shm"];
/// How deep directories are looked into (/dev/disk/by-id is two), and how many devices a container may have.
const DEPTH: u32 = 3;
const DEVICE_LIMIT: usize = 1024;

/// One entry of the annotation.
#[derive(Debug, Deserialize)]
struct Wish {
    /// In the VM.
    source: PathBuf,
    /// In the container.
    path: PathBuf,
    /// Made of r, w and m. A container that may open a device may do all of these with it.
    #[serde(rename = "permissions")]
    _permissions: String,
}

/// The devices of a spec. `mapped`: it is for a user namespace.
pub fn of(spec: &Spec, mapped: bool) -> Result<Vec<LinuxDevice>, ContainerError> {
    let annotation = |name: &str| spec.annotations().as_ref().and_then(|all| all.get(name));
    let mut devices = Vec::new();
    if annotation(PRIVILEGED_ANNOTATION).is_some_and(|value| value == "true") {
        walk(Path::new(DEV), 0, &mut devices)
            .map_err(ContainerError::step("list the VM's devices"))?;
    }
    let wishes: Vec<Wish> = match annotation(DEVICES_ANNOTATION) {
        Some(text) => serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?,
        None => Vec::new(),
    };
    for wish in wishes {
        for path in [&wish.source, &wish.path] {
            below_dev(path)?;
        }
        if mapped && wish.source != wish.path {
            return Err(invalid(format!(
                "{} as {}: in a user namespace a device keeps its name",
                wish.source.display(),
                wish.path.display()
            )));
        }
        let device = node(&wish.source, &wish.path)
            .map_err(|error| invalid(format!("the VM has no device {:?}: {error}", wish.source)))?
            .ok_or_else(|| invalid(format!("{:?} of the VM is no device", wish.source)))?;
        // The host's come by number; by name it would be one of the VM's own: its scratch disk, say.
        if device.typ() == LinuxDeviceType::B {
            return Err(invalid(format!(
                "the host has no block device {:?}, and the VM's own are no volumes",
                wish.source
            )));
        }
        devices.retain(|present| present.path() != device.path());
        devices.push(device);
    }
    if devices.len() > DEVICE_LIMIT {
        return Err(ContainerError::Limit {
            what: "devices of a container",
            limit: DEVICE_LIMIT,
        });
    }
    Ok(devices)
}

fn invalid(reason: String) -> ContainerError {
    ContainerError::Invalid {
        field: "config.devices",
        reason,
    }
}

fn below_dev(path: &Path) -> Result<(), ContainerError> {
    let plain = path.strip_prefix(DEV).is_ok_and(|rest| {
        rest != Path::new("")
            && rest
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
    });
    if plain {
        Ok(())
    } else {
        Err(invalid(format!(
            "{} is no path below {DEV}",
            path.display()
        )))
    }
}

/// Adds every device below `directory`.
fn walk(directory: &Path, depth: u32, devices: &mut Vec<LinuxDevice>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if depth == 0 && OWN.iter().any(|own| *own == name) {
            continue;
        }
        let path = entry.path();
        if entry.file_type()?.is_dir() && depth < DEPTH {
            walk(&path, depth + 1, devices)?;
        } else if devices.len() <= DEVICE_LIMIT
            && let Some(device) = node(&path, &path)?
        {
            devices.push(device);
        }
    }
    Ok(())
}

/// The device at `source`, to be at `path`; `None` where it is none. Follows no link.
fn node(source: &Path, path: &Path) -> io::Result<Option<LinuxDevice>> {
    let metadata = fs::symlink_metadata(source)?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        _ => return Ok(None),
    };
    let number = metadata.rdev();
    let device = LinuxDeviceBuilder::default()
        .path(path)
        .typ(kind)
        .major(i64::from(libc::major(number)))
        .minor(i64::from(libc::minor(number)))
        .file_mode(metadata.mode() & 0o777)
        .uid(0u32)
        .gid(0u32)
        .build();
    device.map(Some).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(name: &str, value: &str) -> Spec {
        serde_json::from_value(json!({"ociVersion": "1.0.2", "annotations": {name: value}}))
            .unwrap()
    }

    #[test]
    fn a_privileged_container_has_all_but_its_own() {
        let all = of(&spec(PRIVILEGED_ANNOTATION, "true"), false).unwrap();
        let null = all
            .iter()
            .find(|d| d.path() == Path::new("/dev/null"))
            .unwrap();
        assert_eq!((null.major(), null.minor()), (1, 3));
        for device in &all {
            assert!(!device.path().starts_with("/dev/pts"), "{device:?}");
        }
        assert!(
            of(&spec(PRIVILEGED_ANNOTATION, "no"), false)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn devices_by_name() {
        let wish = |source: &str, path: &str| {
            let text = json!([{"source": source, "path": path, "permissions": "rw"}]).to_string();
            spec(DEVICES_ANNOTATION, &text)
        };
        let zero = of(&wish("/dev/zero", "/dev/nothing"), false).unwrap();
        assert_eq!(zero[0].path(), Path::new("/dev/nothing"));
        assert_eq!(zero[0].minor(), 5);
        for (source, path, word) in [
            ("/dev/no-such", "/dev/x", "the VM has no device"),
            ("/etc/passwd", "/dev/x", "no path below /dev"),
            ("/dev/../etc/passwd", "/dev/x", "no path below /dev"),
            ("/dev/zero", "/etc/x", "no path below /dev"),
            ("/dev", "/dev/x", "no path below /dev"),
        ] {
            let error = of(&wish(source, path), false).unwrap_err().to_string();
            assert!(
                error.contains(word) && error.contains("config.devices"),
                "{error}"
            );
        }
        let disk = fs::read_dir(DEV).unwrap().flatten().find(|entry| {
            let kind = entry.file_type();
            kind.is_ok_and(|kind| kind.is_block_device())
        });
        let disk = disk.expect("a machine has a disk").path();
        let error = of(&wish(disk.to_str().unwrap(), "/dev/block"), false).unwrap_err();
        assert!(error.to_string().contains("block device"), "{error}");
        assert!(of(&wish("/dev/zero", "/dev/other"), true).is_err());
        assert!(of(&wish("/dev/zero", "/dev/zero"), true).is_ok());
    }
}
