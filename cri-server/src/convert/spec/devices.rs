//! `devices` of the request: block devices of the host, and nodes of the guest's /dev.
//!
//! As in containerd, a block device is an OCI device with its numbers and a rule that allows it. The shim serves it
//! to the VM. Character devices of the host are not available in a VM: a name that every Linux has (/dev/fuse,
//! /dev/net/tun) resolves to the guest's device, and the guest rejects names that it does not have. These names are
//! passed in an annotation, because an OCI device is identified by numbers, and the numbers are the guest's.

use super::ConvertError;
use boxlite_proto::cri::v1::Device;
use nix::libc::{major, minor};
use serde_json::{Value, json};
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path};

/// Names of the request's fields.
const HOST_PATH: &str = "config.devices.host_path";
const CONTAINER_PATH: &str = "config.devices.container_path";

/// Directories below a requested one that have no devices of their parent's kind, as in containerd.
const SKIPPED_DIRECTORIES: [&str; 7] =
    ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
/// Maximum number of devices of a container.
const MAX_DEVICES: usize = 1024;

/// Devices in the form of the spec.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Devices {
    /// Value of the annotation; `None` without devices of the guest.
    pub of_guest: Option<String>,
    /// `linux.devices`: devices of the host.
    pub nodes: Vec<Value>,
    /// Their rules in `linux.resources.devices`.
    pub rules: Vec<Value>,
}

/// Converts the request; reads the type of its paths on the host.
pub(crate) fn devices(wanted: &[Device]) -> Result<Devices, ConvertError> {
    let mut devices = Devices::default();
    let mut of_guest = Vec::new();
    let mut expanded = Vec::new();
    for device in wanted {
        expand(device, &mut expanded)?;
    }
    for device in &expanded {
        let container_path = match device.container_path.as_str() {
            "" => &device.host_path,
            path => path,
        };
        let permissions = permissions(device)?;
        match block_device(&device.host_path)? {
            Some(metadata) => {
                plain(container_path)?;
                let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
                devices.nodes.push(json!({
                    "path": container_path, "type": "b", "major": major, "minor": minor,
                    "fileMode": metadata.mode() & 0o7777, "uid": metadata.uid(), "gid": metadata.gid(),
                }));
                devices.rules.push(json!({
                    "allow": true, "type": "b", "major": major, "minor": minor, "access": permissions,
                }));
            }
            None => {
                below_dev(HOST_PATH, &device.host_path)?;
                below_dev(CONTAINER_PATH, container_path)?;
                of_guest.push(json!({
                    "source": device.host_path,
                    "path": container_path,
                    "permissions": permissions,
                }));
            }
        }
    }
    if !of_guest.is_empty() {
        devices.of_guest = Some(json!(of_guest).to_string());
    }
    Ok(devices)
}

/// Appends the device, or the devices of a directory and its subdirectories, as containerd does.
fn expand(device: &Device, devices: &mut Vec<Device>) -> Result<(), ConvertError> {
    let host_path = Path::new(&device.host_path);
    let is_directory = is_below_dev(&device.host_path)
        && std::fs::symlink_metadata(host_path).is_ok_and(|metadata| metadata.is_dir());
    if !is_directory {
        devices.push(device.clone());
        return Ok(());
    }
    let fail = |reason: String| ConvertError::invalid(HOST_PATH, &device.host_path, reason);
    let mut pending = vec![host_path.to_owned()];
    while let Some(directory) = pending.pop() {
        let entries = std::fs::read_dir(&directory).map_err(|error| fail(error.to_string()))?;
        for entry in entries {
            let entry = entry.map_err(|error| fail(error.to_string()))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(|error| fail(error.to_string()))?;
            if kind.is_dir() {
                let name = entry.file_name();
                if !SKIPPED_DIRECTORIES.iter().any(|skipped| name == *skipped) {
                    pending.push(path);
                }
            } else if kind.is_char_device() || kind.is_block_device() {
                if devices.len() >= MAX_DEVICES {
                    return Err(fail(format!("too many devices (maximum {MAX_DEVICES})")));
                }
                devices.push(inside(device, host_path, &path));
            }
        }
    }
    Ok(())
}

/// Returns the device at `path` below the directory of a request.
fn inside(device: &Device, directory: &Path, path: &Path) -> Device {
    let target = match device.container_path.as_str() {
        "" => directory,
        target => Path::new(target),
    };
    let relative = path.strip_prefix(directory).unwrap_or(path);
    Device {
        host_path: path.to_string_lossy().into_owned(),
        container_path: target.join(relative).to_string_lossy().into_owned(),
        permissions: device.permissions.clone(),
    }
}

fn permissions(device: &Device) -> Result<&str, ConvertError> {
    match device.permissions.as_str() {
        "" => Ok("rwm"),
        text if text.chars().all(|c| "rwm".contains(c)) => Ok(text),
        text => Err(ConvertError::invalid(
            "config.devices.permissions",
            text,
            "must consist of r, w and m",
        )),
    }
}

/// Returns the metadata of a host path, links followed, if it is a block device; `None` if the guest's /dev decides.
fn block_device(path: &str) -> Result<Option<Metadata>, ConvertError> {
    let refuse = |reason: String| Err(ConvertError::invalid(HOST_PATH, path, reason));
    if !Path::new(path).is_absolute() || path.contains('\0') {
        return refuse("must be an absolute path".to_owned());
    }
    let of_guest = is_below_dev(path);
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_block_device() => Ok(Some(metadata)),
        _ if of_guest => Ok(None),
        Ok(_) => refuse("not a block device; other devices must be paths below /dev".to_owned()),
        Err(error) => refuse(error.to_string()),
    }
}

/// Validates the path of a device in the container: absolute, without `..`.
fn plain(path: &str) -> Result<(), ConvertError> {
    let mut parts = Path::new(path).components();
    let root = parts.next() == Some(Component::RootDir);
    let mut names = parts.peekable();
    let any = names.peek().is_some();
    let good = root && any && names.all(|part| matches!(part, Component::Normal(_)));
    if good && !path.contains('\0') {
        return Ok(());
    }
    Err(ConvertError::invalid(
        CONTAINER_PATH,
        path,
        "must be an absolute path without \"..\"",
    ))
}

/// Validates a plain path below /dev.
fn below_dev(field: &'static str, path: &str) -> Result<(), ConvertError> {
    if is_below_dev(path) {
        return Ok(());
    }
    Err(ConvertError::invalid(
        field,
        path,
        "must be a path below /dev: only block devices come from the host",
    ))
}

fn is_below_dev(path: &str) -> bool {
    let inside = Path::new(path).strip_prefix("/dev").is_ok_and(|rest| {
        rest.components().next().is_some()
            && rest
                .components()
                .all(|part| matches!(part, Component::Normal(_)))
    });
    inside && !path.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, container: &str, permissions: &str) -> Device {
        Device {
            container_path: container.into(),
            host_path: host.into(),
            permissions: permissions.into(),
        }
    }

    #[test]
    fn guest_devices_are_passed_by_path() {
        assert_eq!(devices(&[]), Ok(Devices::default()));
        let found = devices(&[
            device("/dev/fuse", "", "rw"),
            device("/dev/net/tun", "/dev/tun", ""),
        ])
        .unwrap();
        let list: Value = serde_json::from_str(&found.of_guest.unwrap()).unwrap();
        assert_eq!(
            list,
            json!([
                {"source": "/dev/fuse", "path": "/dev/fuse", "permissions": "rw"},
                {"source": "/dev/net/tun", "path": "/dev/tun", "permissions": "rwm"},
            ])
        );
        assert!(found.nodes.is_empty() && found.rules.is_empty());
    }

    #[test]
    fn block_devices_are_resolved_through_links() {
        let disk = std::fs::read_dir("/dev").unwrap().flatten().find(|entry| {
            let kind = entry.file_type();
            kind.is_ok_and(|kind| kind.is_block_device())
        });
        let disk = disk.expect("a machine has a disk").path();
        let number = std::fs::metadata(&disk).unwrap().rdev();
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("pv");
        std::os::unix::fs::symlink(&disk, &link).unwrap();
        let found = devices(&[device(link.to_str().unwrap(), "/block0", "r")]).unwrap();
        assert_eq!(found.of_guest, None);
        assert_eq!(found.nodes[0]["path"], "/block0");
        assert_eq!(
            found.rules,
            [
                json!({"allow": true, "type": "b", "major": major(number), "minor": minor(number), "access": "r"})
            ]
        );
        let disk = disk.to_str().unwrap();
        for bad in ["block0", "/", "/a/../b", "/a\0"] {
            let error = devices(&[device(disk, bad, "")]).unwrap_err().to_string();
            assert!(error.contains(CONTAINER_PATH), "{error}");
        }
    }

    #[test]
    fn directory_is_expanded_to_its_devices() {
        if !Path::new("/dev/net/tun").exists() {
            return;
        }
        let found = devices(&[device("/dev/net", "", "rw")]).unwrap();
        let list: Value = serde_json::from_str(&found.of_guest.unwrap()).unwrap();
        assert_eq!(
            list,
            json!([{"source": "/dev/net/tun", "path": "/dev/net/tun", "permissions": "rw"}])
        );
        let moved = inside(
            &device("/dev/a", "/dev/b", "r"),
            Path::new("/dev/a"),
            Path::new("/dev/a/c/d"),
        );
        assert_eq!(moved, device("/dev/a/c/d", "/dev/b/c/d", "r"));
    }

    #[test]
    fn other_devices_are_rejected() {
        for (bad, field) in [
            (device("/etc/passwd", "", ""), HOST_PATH),
            (device("/no/such/disk", "", ""), HOST_PATH),
            (device("/dev/../etc", "", ""), HOST_PATH),
            (device("/dev", "", ""), HOST_PATH),
            (device("", "", ""), HOST_PATH),
            (device("dev/fuse", "", ""), HOST_PATH),
            (device("/dev/fuse", "/x", ""), CONTAINER_PATH),
            (device("/dev/fuse", "", "rwx"), "config.devices.permissions"),
        ] {
            let error = devices(std::slice::from_ref(&bad)).unwrap_err().to_string();
            assert!(error.contains(field), "{bad:?}: {error}");
        }
    }
}
