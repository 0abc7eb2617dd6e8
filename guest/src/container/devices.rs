//! Device nodes of a container beyond the standard ones: all of the VM's if it is privileged, else the requested
//! ones.
//!
//! The VM's devices are found in its /dev (devtmpfs). libcontainer creates the nodes: with mknod, or by bind mounts
//! in a user namespace.

use super::error::ContainerError;
use boxlite_proto::names::{DEVICES_ANNOTATION, PRIVILEGED_ANNOTATION};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Spec};
use serde::Deserialize;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// Directory of the VM's devices.
const DEV: &str = "/dev";
/// Entries of [`DEV`] that every container has its own of.
const OWN: [&str; 7] = ["boxlite", "console", "fd", "mqueue", "ptmx", "pts", "shm"];
/// Maximum depth of directories searched for devices (/dev/disk/by-id has two levels), and maximum number of devices
/// of a container.
const MAX_DEPTH: u32 = 3;
const MAX_DEVICES: usize = 1024;

/// One entry of the annotation.
#[derive(Debug, Deserialize)]
struct DeviceRequest {
    /// Path in the VM.
    source: PathBuf,
    /// Path in the container.
    path: PathBuf,
    /// Any of r, w and m. Not evaluated: a container that may open a device has all three permissions.
    #[serde(rename = "permissions")]
    _permissions: String,
}

/// Returns the devices of a spec. `mapped` is true if the container is in a user namespace.
pub(crate) fn of(spec: &Spec, mapped: bool) -> Result<Vec<LinuxDevice>, ContainerError> {
    let annotation = |name: &str| spec.annotations().as_ref().and_then(|all| all.get(name));
    let mut devices = Vec::new();
    if annotation(PRIVILEGED_ANNOTATION).is_some_and(|value| value == "true") {
        walk(Path::new(DEV), 0, &mut devices)
            .map_err(ContainerError::step("failed to list the VM's devices"))?;
    }
    let requests: Vec<DeviceRequest> = match annotation(DEVICES_ANNOTATION) {
        Some(text) => serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?,
        None => Vec::new(),
    };
    for request in requests {
        for path in [&request.source, &request.path] {
            below_dev(path)?;
        }
        if mapped && request.source != request.path {
            return Err(invalid(format!(
                "invalid path {:?} of device {:?}: a device keeps its name in a user namespace",
                request.source.display(),
                request.path.display()
            )));
        }
        let device = node(&request.source, &request.path)
            .map_err(|error| {
                invalid(format!(
                    "device {:?} not found in the VM: {error}",
                    request.source
                ))
            })?
            .ok_or_else(|| invalid(format!("{:?} in the VM is not a device", request.source)))?;
        // Block devices of the host are requested by number; a name would select one of the VM's, such as its scratch
        // disk.
        if device.typ() == LinuxDeviceType::B {
            return Err(invalid(format!(
                "block device {:?} not found on the host, and block devices of the VM cannot be used as volumes",
                request.source
            )));
        }
        devices.retain(|present| present.path() != device.path());
        devices.push(device);
    }
    if devices.len() > MAX_DEVICES {
        return Err(ContainerError::Limit {
            what: "devices of a container",
            limit: MAX_DEVICES,
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
            "{} is not a path below {DEV}",
            path.display()
        )))
    }
}

/// Collects all devices below `directory`.
fn walk(directory: &Path, depth: u32, devices: &mut Vec<LinuxDevice>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if depth == 0 && OWN.iter().any(|own| *own == name) {
            continue;
        }
        let path = entry.path();
        if entry.file_type()?.is_dir() && depth < MAX_DEPTH {
            walk(&path, depth + 1, devices)?;
        } else if devices.len() <= MAX_DEVICES
            && let Some(device) = node(&path, &path)?
        {
            devices.push(device);
        }
    }
    Ok(())
}

/// Returns the device at `source` with the path `path`, or `None` if it is not a device. Does not follow symlinks.
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
    fn devices_privileged_returns_all_but_standard_ones() {
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
    fn devices_by_name_returns_requested_or_rejects() {
        let request = |source: &str, path: &str| {
            let text = json!([{"source": source, "path": path, "permissions": "rw"}]).to_string();
            spec(DEVICES_ANNOTATION, &text)
        };
        let zero = of(&request("/dev/zero", "/dev/nothing"), false).unwrap();
        assert_eq!(zero[0].path(), Path::new("/dev/nothing"));
        assert_eq!(zero[0].minor(), 5);
        for (source, path, word) in [
            ("/dev/no-such", "/dev/x", "not found in the VM"),
            ("/etc/passwd", "/dev/x", "not a path below /dev"),
            ("/dev/../etc/passwd", "/dev/x", "not a path below /dev"),
            ("/dev/zero", "/etc/x", "not a path below /dev"),
            ("/dev", "/dev/x", "not a path below /dev"),
        ] {
            let error = of(&request(source, path), false).unwrap_err().to_string();
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
        let error = of(&request(disk.to_str().unwrap(), "/dev/block"), false).unwrap_err();
        assert!(error.to_string().contains("block device"), "{error}");
        assert!(of(&request("/dev/zero", "/dev/other"), true).is_err());
        assert!(of(&request("/dev/zero", "/dev/zero"), true).is_ok());
    }
}
