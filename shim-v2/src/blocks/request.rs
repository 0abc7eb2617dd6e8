//! [`take`]: extracts the host's block devices from a spec: their numbers are the host's and mean other devices in the guest.
//!
//! A device is requested if `linux.devices` lists it and `linux.resources.devices` allows its number, as boxlite-cri, containerd's
//! CRI plugin and `ctr run --device` do. A privileged container under containerd lists all devices of the node and allows
//! everything, which requests none of them; it gets the VM's devices.

use super::device::Number;
use crate::error::{Result, ShimError};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use std::path::PathBuf;

/// Maximum number of devices per container.
const MAX_DEVICES: usize = 32;
/// Default permissions of a node, as most disks have.
const DEFAULT_MODE: u32 = 0o660;

/// A block device requested by a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRequest {
    pub number: Number,
    /// Path in the container.
    pub path: PathBuf,
    /// Allowed access: letters of "rwm".
    pub access: String,
    /// Permission bits and owners of the node.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl DeviceRequest {
    /// Reports whether writing is not allowed.
    pub fn read_only(&self) -> bool {
        !self.access.contains('w')
    }

    /// Returns an error about this device.
    pub fn refuse(&self, reason: impl std::fmt::Display) -> ShimError {
        let (path, number) = (self.path.display(), self.number);
        ShimError::Invalid {
            field: "linux.devices",
            reason: format!("block device {number} for {path}: {reason}"),
        }
    }
}

/// Removes the block devices, and every rule about one by its number, from `spec` and returns the devices.
///
/// # Errors
/// Invalid if a number is invalid or there are too many devices.
pub fn take(spec: &mut Spec) -> Result<Vec<DeviceRequest>> {
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(Vec::new());
    };
    let mut resources = linux.resources().clone().unwrap_or_default();
    let rules = resources.devices().clone().unwrap_or_default();
    let (mut requests, mut others) = (Vec::new(), Vec::new());
    for device in linux.devices().clone().unwrap_or_default() {
        match access(&rules, &device) {
            Some(access) => requests.push(request(&device, access)?),
            None => others.push(device),
        }
    }
    if requests.len() > MAX_DEVICES {
        return Err(ShimError::Invalid {
            field: "linux.devices",
            reason: format!("{} block devices (maximum {MAX_DEVICES})", requests.len()),
        });
    }
    let kept: Vec<_> = rules
        .iter()
        .filter(|rule| !numbered(rule))
        .cloned()
        .collect();
    if requests.is_empty() && kept.len() == rules.len() {
        return Ok(requests);
    }
    resources.set_devices(Some(kept));
    linux
        .set_resources(Some(resources))
        .set_devices(Some(others));
    spec.set_linux(Some(linux));
    Ok(requests)
}

/// Reports whether a rule names a block device by number.
fn numbered(rule: &LinuxDeviceCgroup) -> bool {
    rule.typ() == Some(LinuxDeviceType::B) && rule.major().is_some_and(|major| major >= 0)
}

/// Returns the access that rules grant to this device's number; None if there is no such rule or it is not a block device.
fn access(rules: &[LinuxDeviceCgroup], device: &LinuxDevice) -> Option<String> {
    if device.typ() != LinuxDeviceType::B {
        return None;
    }
    let number = (Some(device.major()), Some(device.minor()));
    let mut own = rules
        .iter()
        .filter(|rule| rule.allow() && numbered(rule))
        .filter(|rule| (rule.major(), rule.minor()) == number)
        .peekable();
    own.peek()?;
    let accesses: Vec<&str> = own
        .map(|rule| rule.access().as_deref().unwrap_or("rwm"))
        .collect();
    let allowed = |letter: &char| accesses.iter().any(|access| access.contains(*letter));
    Some(['r', 'w', 'm'].iter().filter(|l| allowed(l)).collect())
}

fn request(device: &LinuxDevice, access: String) -> Result<DeviceRequest> {
    let number = |value: i64| {
        u32::try_from(value).map_err(|_| ShimError::Invalid {
            field: "linux.devices",
            reason: format!("invalid device number {value}"),
        })
    };
    Ok(DeviceRequest {
        number: Number {
            major: number(device.major())?,
            minor: number(device.minor())?,
        },
        path: device.path().clone(),
        access,
        mode: device.file_mode().unwrap_or(DEFAULT_MODE) & 0o777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(devices: Value, rules: Value) -> Spec {
        let linux = json!({"devices": devices, "resources": {"devices": rules}});
        serde_json::from_value(json!({"ociVersion": "1.0.2", "linux": linux})).expect("a spec")
    }

    fn others(spec: &Spec) -> (usize, usize) {
        let linux = spec.linux().as_ref().expect("linux");
        let rules = linux.resources().as_ref().expect("resources").devices();
        (
            linux.devices().as_ref().map_or(0, Vec::len),
            rules.as_ref().map_or(0, Vec::len),
        )
    }

    #[test]
    fn take_extracts_devices_with_their_own_rule() {
        let mut spec = spec(
            json!([
                {"path": "/dev/xvda", "type": "b", "major": 8, "minor": 16, "fileMode": 432, "uid": 0, "gid": 6},
                {"path": "/ro", "type": "b", "major": 8, "minor": 32},
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                {"path": "/dev/other", "type": "b", "major": 8, "minor": 0},
            ]),
            json!([
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 8, "minor": 16, "access": "rwm"},
                {"allow": true, "type": "b", "major": 8, "minor": 32, "access": "r"},
                {"allow": true, "type": "b", "major": 254, "minor": 0, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
            ]),
        );
        let requests = take(&mut spec).expect("taken");
        assert_eq!(requests.len(), 2);
        let number = Number {
            major: 8,
            minor: 16,
        };
        assert_eq!(
            (requests[0].number, requests[0].access.as_str()),
            (number, "rwm")
        );
        assert_eq!((requests[0].mode, requests[0].gid), (0o660, 6));
        assert!(!requests[0].read_only() && requests[1].read_only());
        // The VM's scratch disk has a number, too.
        assert_eq!(others(&spec), (2, 2));
    }

    #[test]
    fn take_privileged_spec_returns_no_devices() {
        let mut spec = spec(
            json!([{"path": "/dev/vda", "type": "b", "major": 254, "minor": 0}]),
            json!([{"allow": true, "access": "rwm"}]),
        );
        assert!(take(&mut spec).expect("taken").is_empty());
        assert_eq!(others(&spec), (1, 1));
    }

    #[test]
    fn take_rejects_invalid_numbers_and_too_many_devices() {
        let rule = |minor: i64| json!({"allow": true, "type": "b", "major": 8, "minor": minor, "access": "r"});
        let device = |minor: i64| json!({"path": "/d", "type": "b", "major": 8, "minor": minor});
        let mut bad = spec(json!([device(1 << 40)]), json!([rule(1 << 40)]));
        assert!(take(&mut bad).is_err());
        let many = 0..=i64::try_from(MAX_DEVICES).expect("small");
        let mut many = spec(many.clone().map(device).collect(), many.map(rule).collect());
        assert!(take(&mut many).is_err());
    }
}
