//! Pod annotations that change the VM, where the configuration allows them. [`Wishes::read`] checks all of them.
//!
//! Every annotation that begins with `io.boxlite.` is meant for this shim: one it does not know, or may not follow, is
//! refused by name rather than ignored. They count for the pod as a whole and are read when its VM is made.

use crate::error::{Result, ShimError};
use boxlite_proto::vmm::VmmKind;
use std::collections::HashMap;
use std::path::PathBuf;

/// What makes an annotation ours.
const PREFIX: &str = "io.boxlite.";
/// `krun` or `qemu`.
const VMM: &str = "io.boxlite.vmm";
/// 1 to 64.
const VCPUS: &str = "io.boxlite.vcpus";
/// Memory for the containers in MiB; the overhead is added.
const MEMORY: &str = "io.boxlite.memory-mib";
/// Path of a libkrunfw on the node: another guest kernel. Its code runs on the host too, in the jail.
const KERNEL: &str = "io.boxlite.kernel";
/// `true` or `false`: the kernel's messages in console.log.
const CONSOLE: &str = "io.boxlite.debug-console";

/// All that are known.
pub const NAMES: [&str; 5] = [VMM, VCPUS, MEMORY, KERNEL, CONSOLE];

/// What a pod asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Which VMM.
    pub vmm: Option<VmmKind>,
    /// How many CPUs.
    pub vcpus: Option<u8>,
    /// MiB without overhead.
    pub memory_mib: Option<u32>,
    /// Another libkrunfw.
    pub kernel: Option<PathBuf>,
    /// Kernel messages.
    pub debug_console: Option<bool>,
}

impl Wishes {
    /// Reads them out of a pod's annotations.
    ///
    /// # Errors
    /// Invalid, naming the annotation: unknown, not allowed, or a value nothing can be done with.
    pub fn read(annotations: &HashMap<String, String>, allowed: &[String]) -> Result<Self> {
        let mut wishes = Self::default();
        let mut ours: Vec<_> = annotations
            .iter()
            .filter(|(name, _)| name.starts_with(PREFIX))
            .collect();
        // One and the same message, however the map is ordered.
        ours.sort();
        for (name, value) in ours {
            if !NAMES.contains(&name.as_str()) {
                return Err(refuse(format!(
                    "{name} is not known; known are {}",
                    NAMES.join(", ")
                )));
            }
            if !allowed.contains(name) {
                return Err(refuse(format!(
                    "{name} is not among the allowed_annotations of the node's shim configuration"
                )));
            }
            wishes.take(name, value)?;
        }
        Ok(wishes)
    }

    fn take(&mut self, name: &str, value: &str) -> Result<()> {
        let bad = |wanted: &str| refuse(format!("{name} = {value:?}: {wanted}"));
        match name {
            VMM => {
                self.vmm = Some(value.parse().map_err(|_| bad("krun or qemu"))?);
            }
            VCPUS => {
                let count = value.parse().ok().filter(|count| (1..=64).contains(count));
                self.vcpus = Some(count.ok_or_else(|| bad("1 to 64"))?);
            }
            MEMORY => {
                let mib = value.parse().ok();
                let mib = mib.filter(|mib| (64..=1 << 20).contains(mib));
                self.memory_mib = Some(mib.ok_or_else(|| bad("64 to 1048576 MiB"))?);
            }
            KERNEL => {
                let path = PathBuf::from(value);
                if !path.is_absolute() || !path.is_file() {
                    return Err(bad("no absolute path of a file on this node"));
                }
                self.kernel = Some(path);
            }
            _ => self.debug_console = Some(value.parse().map_err(|_| bad("true or false"))?),
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

    fn read(pairs: &[(&str, &str)], allowed: &[&str]) -> Result<Wishes> {
        let own = |text: &&str| (*text).to_owned();
        let annotations = pairs.iter().map(|(k, v)| (own(k), own(v))).collect();
        Wishes::read(&annotations, &allowed.iter().map(own).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_not_allowed_or_not_known_is_refused_by_name() {
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
            error.contains("io.boxlite.speed") && error.contains("not known"),
            "{error}"
        );
        assert_eq!(
            read(&[("other.io/x", "9")], &[]).expect("not ours"),
            Wishes::default()
        );
    }

    #[test]
    fn values_are_checked() {
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
        let wishes = read(
            &[
                (VMM, "qemu"),
                (VCPUS, "2"),
                (MEMORY, "512"),
                (CONSOLE, "true"),
            ],
            &all,
        );
        let wishes = wishes.expect("valid");
        assert_eq!(
            (
                wishes.vmm,
                wishes.vcpus,
                wishes.memory_mib,
                wishes.debug_console
            ),
            (Some(VmmKind::Qemu), Some(2), Some(512), Some(true))
        );
    }
}
