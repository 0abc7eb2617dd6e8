//! [`take`]: block devices of the host that a spec asks for, taken out of it: their numbers are the host's, and mean other
//! devices in the guest.
//!
//! Asked for is what `linux.devices` lists and `linux.resources.devices` allows by its number: so do boxlite-cri, containerd's
//! CRI plugin and `ctr run --device`. A privileged container under containerd lists all that the node has and allows
//! everything, which asks for no device of them; it stays with what the VM has.

use super::device::Number;
use crate::error::{Result, ShimError};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use std::path::PathBuf;

/// Devices of one container.
const LIMIT: usize = 32;
/// Permissions of a node whose spec names none: as most disks have.
const MODE: u32 = 0o660;

/// A device that a container wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    pub number: Number,
    /// In the container.
    pub path: PathBuf,
    /// Made of r, w and m.
    pub access: String,
    /// The node's permission bits and owners.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Wish {
    /// Whether nothing is to be written.
    pub fn read_only(&self) -> bool {
        !self.access.contains('w')
    }

    /// An error about it.
    pub fn refuse(&self, reason: impl std::fmt::Display) -> ShimError {
        let (path, number) = (self.path.display(), self.number);
        ShimError::Invalid {
            field: "linux.devices",
            reason: format!("block device {number} for {path}: {reason}"),
        }
    }
}

/// Takes the block devices out of `spec`, and every rule about one by its number.
///
/// # Errors
/// Invalid: a number that is none, or too many of them.
pub fn take(spec: &mut Spec) -> Result<Vec<Wish>> {
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(Vec::new());
    };
    let mut resources = linux.resources().clone().unwrap_or_default();
    let rules = resources.devices().clone().unwrap_or_default();
    let (mut wishes, mut left) = (Vec::new(), Vec::new());
    for device in linux.devices().clone().unwrap_or_default() {
        match access(&rules, &device) {
            Some(access) => wishes.push(wish(&device, access)?),
            None => left.push(device),
        }
    }
    if wishes.len() > LIMIT {
        return Err(ShimError::Invalid {
            field: "linux.devices",
            reason: format!("{} block devices, at most {LIMIT}", wishes.len()),
        });
    }
    let kept: Vec<_> = rules
        .iter()
        .filter(|rule| !numbered(rule))
        .cloned()
        .collect();
    if wishes.is_empty() && kept.len() == rules.len() {
        return Ok(wishes);
    }
    resources.set_devices(Some(kept));
    linux.set_resources(Some(resources)).set_devices(Some(left));
    spec.set_linux(Some(linux));
    Ok(wishes)
}

/// Whether a rule is about block devices by number.
fn numbered(rule: &LinuxDeviceCgroup) -> bool {
    rule.typ() == Some(LinuxDeviceType::B) && rule.major().is_some_and(|major| major >= 0)
}

/// What the rules allow by the number of this very device; None: nothing, or it is no block device.
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
    let words: Vec<&str> = own
        .map(|rule| rule.access().as_deref().unwrap_or("rwm"))
        .collect();
    let allowed = |letter: &char| words.iter().any(|word| word.contains(*letter));
    Some(['r', 'w', 'm'].iter().filter(|l| allowed(l)).collect())
}

fn wish(device: &LinuxDevice, access: String) -> Result<Wish> {
    let number = |value: i64| {
        u32::try_from(value).map_err(|_| ShimError::Invalid {
            field: "linux.devices",
            reason: format!("{value} is no device number"),
        })
    };
    Ok(Wish {
        number: Number {
            major: number(device.major())?,
            minor: number(device.minor())?,
        },
        path: device.path().clone(),
        access,
        mode: device.file_mode().unwrap_or(MODE) & 0o777,
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

    fn left(spec: &Spec) -> (usize, usize) {
        let linux = spec.linux().as_ref().expect("linux");
        let rules = linux.resources().as_ref().expect("resources").devices();
        (
            linux.devices().as_ref().map_or(0, Vec::len),
            rules.as_ref().map_or(0, Vec::len),
        )
    }

    #[test]
    fn devices_with_a_rule_of_their_own_are_taken() {
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
        let wishes = take(&mut spec).expect("taken");
        assert_eq!(wishes.len(), 2);
        let number = Number {
            major: 8,
            minor: 16,
        };
        assert_eq!(
            (wishes[0].number, wishes[0].access.as_str()),
            (number, "rwm")
        );
        assert_eq!((wishes[0].mode, wishes[0].gid), (0o660, 6));
        assert!(!wishes[0].read_only() && wishes[1].read_only());
        // The scratch disk of the VM has a number, too.
        assert_eq!(left(&spec), (2, 2));
    }

    #[test]
    fn a_privileged_list_of_everything_asks_for_nothing() {
        let mut spec = spec(
            json!([{"path": "/dev/vda", "type": "b", "major": 254, "minor": 0}]),
            json!([{"allow": true, "access": "rwm"}]),
        );
        assert!(take(&mut spec).expect("taken").is_empty());
        assert_eq!(left(&spec), (1, 1));
    }

    #[test]
    fn numbers_and_counts_are_bounded() {
        let rule = |minor: i64| json!({"allow": true, "type": "b", "major": 8, "minor": minor, "access": "r"});
        let device = |minor: i64| json!({"path": "/d", "type": "b", "major": 8, "minor": minor});
        let mut bad = spec(json!([device(1 << 40)]), json!([rule(1 << 40)]));
        assert!(take(&mut bad).is_err());
        let many = 0..=i64::try_from(LIMIT).expect("small");
        let mut many = spec(many.clone().map(device).collect(), many.map(rule).collect());
        assert!(take(&mut many).is_err());
    }
}
