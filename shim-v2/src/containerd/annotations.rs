//! Pod annotations that change the VM, if the configuration allows them. [`PodOverrides::read`] checks all of them.
//!
//! Annotations that begin with `io.boxlite.` are addressed to this shim: unknown and disallowed ones are refused by name rather
//! than ignored. They apply to the pod as a whole and are read when its VM is created.

use crate::error::{Result, ShimError};
use boxlite_config::pod::{MEMORY_MIB, VCPUS as VCPU_RANGE};
use boxlite_proto::vmm::VmmKind;
use std::collections::HashMap;
use std::path::PathBuf;

/// Prefix of this shim's annotations.
pub(crate) const PREFIX: &str = "io.boxlite.";
/// `krun` or `qemu`.
const VMM: &str = "io.boxlite.vmm";
/// 1 to 64.
const VCPUS: &str = "io.boxlite.vcpus";
/// Memory for the containers in MiB; the overhead is added.
const MEMORY: &str = "io.boxlite.memory-mib";
/// Path of a libkrunfw on the node: another guest kernel. Its code runs on the host, too, inside the jail.
const KERNEL: &str = "io.boxlite.kernel";
/// `true` or `false`: kernel messages in console.log.
const CONSOLE: &str = "io.boxlite.debug-console";

/// All known annotations.
pub const NAMES: [&str; 5] = [VMM, VCPUS, MEMORY, KERNEL, CONSOLE];

/// Settings of a pod that override the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodOverrides {
    /// The VMM.
    pub vmm: Option<VmmKind>,
    /// Virtual CPUs.
    pub vcpus: Option<u8>,
    /// Memory for the containers in MiB.
    pub memory_mib: Option<u32>,
    /// Guest kernel.
    pub kernel: Option<PathBuf>,
    /// Kernel messages.
    pub debug_console: Option<bool>,
}

impl PodOverrides {
    /// Reads a pod's annotations.
    ///
    /// # Errors
    /// Invalid, naming the annotation: unknown, not allowed, or an invalid value.
    pub fn read(annotations: &HashMap<String, String>, allowed: &[String]) -> Result<Self> {
        let mut overrides = Self::default();
        let mut ours: Vec<_> = annotations
            .iter()
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        // Sorted, so that the message does not depend on the order of the map.
        ours.sort();
        for (name, value) in ours {
            if !NAMES.contains(&name.as_str()) {
                return Err(refuse(format!(
                    "unknown annotation {name}; known are {}",
                    NAMES.join(", ")
                )));
            }
            if !allowed.contains(name) {
                return Err(refuse(format!(
                    "{name} is not among the allowed_annotations of the node's shim configuration"
                )));
            }
            overrides.take(name, value)?;
        }
        Ok(overrides)
    }

    fn take(&mut self, name: &str, value: &str) -> Result<()> {
        let bad = |expected: &str| refuse(format!("{name} = {value:?}: {expected}"));
        let number = |range: &std::ops::RangeInclusive<i64>| {
            value.parse().ok().filter(|number| range.contains(number))
        };
        match name {
            VMM => {
                self.vmm = Some(value.parse().map_err(|_| bad("must be krun or qemu"))?);
            }
            VCPUS => {
                let count = number(&VCPU_RANGE).and_then(|count| u8::try_from(count).ok());
                self.vcpus = Some(count.ok_or_else(|| bad("must be 1 to 64"))?);
            }
            MEMORY => {
                let mib = number(&MEMORY_MIB).and_then(|mib| u32::try_from(mib).ok());
                self.memory_mib = Some(mib.ok_or_else(|| bad("must be 64 to 1048576 MiB"))?);
            }
            KERNEL => {
                let path = PathBuf::from(value);
                if !path.is_absolute() || !path.is_file() {
                    return Err(bad("not an absolute path of a file on this node"));
                }
                self.kernel = Some(path);
            }
            _ => {
                self.debug_console = Some(value.parse().map_err(|_| bad("must be true or false"))?)
            }
        }
        Ok(())
    }
}

fn refuse(reason: String) -> ShimError {
    ShimError::Invalid {
        field: "annotation",
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)], allowed: &[&str]) -> Result<PodOverrides> {
        let own = |text: &&str| (*text).to_owned();
        let annotations = pairs.iter().map(|(k, v)| (own(k), own(v))).collect();
        PodOverrides::read(&annotations, &allowed.iter().map(own).collect::<Vec<_>>())
    }

    #[test]
    fn unknown_or_disallowed_annotation_is_refused_by_name() {
        let error = read(&[(VCPUS, "2")], &[])
            .expect_err("not allowed")
            .to_string();
        assert!(
            error.contains(VCPUS) && error.contains("allowed_annotations"),
            "{error}"
        );
        let error = read(&[("io.boxlite.speed", "9")], &[VCPUS])
            .expect_err("unknown")
            .to_string();
        assert!(
            error.contains("io.boxlite.speed") && error.contains("unknown"),
            "{error}"
        );
        assert_eq!(
            read(&[("other.io/x", "9")], &[]).expect("another program's"),
            PodOverrides::default()
        );
    }

    #[test]
    fn invalid_value_is_refused_by_name() {
        let all: Vec<&str> = NAMES.to_vec();
        for (name, value) in [
            (VMM, "xen"),
            (VCPUS, "0"),
            (VCPUS, "65"),
            (MEMORY, "-1"),
            (MEMORY, "1"),
            (KERNEL, "vmlinuz"),
            (KERNEL, "/no/such/file"),
            (CONSOLE, "yes"),
        ] {
            let error = read(&[(name, value)], &all).expect_err(value).to_string();
            assert!(error.contains(name) && error.contains(value), "{error}");
        }
        let overrides = read(
            &[
                (VMM, "qemu"),
                (VCPUS, "2"),
                (MEMORY, "512"),
                (CONSOLE, "true"),
            ],
            &all,
        );
        let overrides = overrides.expect("valid");
        assert_eq!(
            (
                overrides.vmm,
                overrides.vcpus,
                overrides.memory_mib,
                overrides.debug_console
            ),
            (Some(VmmKind::Qemu), Some(2), Some(512), Some(true))
        );
    }
}
