//! [`Paths`]: programs and files of the installation, the `[paths]` section.
//!
//! The defaults are where `make install PREFIX=<prefix>` puts them, with the prefix taken from the running program.

use crate::section::Section;
use crate::value;
use boxlite_proto::vmm::Installation;
use std::path::{Path, PathBuf};

/// State directory of boxlite-cri unless another one is configured. The shim under containerd uses its registry of volumes,
/// so that the pods of both know of each other.
pub const DEFAULT_STATE_DIR: &str = "/run/boxlite";
/// Prefix if the running program is not below a `bin` directory, as in a build tree.
const DEFAULT_PREFIX: &str = "/usr/local";
/// Guest kernel of Debian's package libkrunfw5.
const DEBIAN_KERNEL: &str = "/usr/lib/x86_64-linux-gnu/libkrunfw.so.5";
/// passt of the distribution.
const SYSTEM_PASST: &str = "/usr/bin/passt";

/// Programs and files that a VM needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The static agent. Default `<prefix>/libexec/boxlite/boxlite-guest`.
    pub guest: PathBuf,
    /// Guest kernel. Default `<prefix>/lib/boxlite/libkrunfw.so.5`; Debian's package if that file is absent.
    pub libkrunfw: PathBuf,
    /// QEMU. Default /usr/bin/qemu-system-x86_64.
    pub qemu: PathBuf,
    /// Share server for QEMU. Default beside the agent.
    pub virtiofsd: PathBuf,
    /// vsock device for QEMU. Default beside the agent.
    pub vhost_device_vsock: PathBuf,
    /// Network of pods without CNI. Default beside the agent; the distribution's if that file is absent.
    pub passt: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self::below(&prefix())
    }
}

/// Returns the installation prefix: the directory above the running program's `bin`, else /usr/local.
pub fn prefix() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|exe| prefix_of(&exe))
        .unwrap_or_else(|| DEFAULT_PREFIX.into())
}

fn prefix_of(exe: &Path) -> Option<PathBuf> {
    let bin = exe.parent()?;
    (bin.file_name()? == "bin")
        .then(|| bin.parent().map(Path::to_owned))
        .flatten()
}

/// Returns the guest kernel's path in an installation, whether it exists or not.
pub fn installed_kernel(prefix: &Path) -> PathBuf {
    prefix.join("lib/boxlite/libkrunfw.so.5")
}

/// Returns the shim's path in an installation.
pub fn installed_shim(prefix: &Path) -> PathBuf {
    prefix.join("bin/containerd-shim-boxlite-v2")
}

impl Paths {
    /// Returns the paths of the installation below `prefix`.
    pub fn below(prefix: &Path) -> Self {
        let programs = prefix.join("libexec/boxlite");
        let kernel = installed_kernel(prefix);
        let passt = programs.join("passt");
        Self {
            guest: programs.join("boxlite-guest"),
            libkrunfw: if kernel.exists() {
                kernel
            } else {
                DEBIAN_KERNEL.into()
            },
            qemu: "/usr/bin/qemu-system-x86_64".into(),
            virtiofsd: programs.join("virtiofsd"),
            vhost_device_vsock: programs.join("vhost-device-vsock"),
            passt: if passt.exists() {
                passt
            } else {
                SYSTEM_PASST.into()
            },
        }
    }

    /// Reads the shared keys of `[paths]`. The caller reads its own and finishes the section.
    pub fn read(section: &mut Section) -> Self {
        let default = Self::default();
        Self {
            guest: section.take("guest", default.guest, value::absolute),
            libkrunfw: section.take("libkrunfw", default.libkrunfw, value::absolute),
            qemu: section.take("qemu", default.qemu, value::absolute),
            virtiofsd: section.take("virtiofsd", default.virtiofsd, value::absolute),
            vhost_device_vsock: section.take(
                "vhost_device_vsock",
                default.vhost_device_vsock,
                value::absolute,
            ),
            passt: section.take("passt", default.passt, value::absolute),
        }
    }

    /// Returns the installation for a VM's description; derived files are kept in `cache`.
    pub fn installation(&self, cache: PathBuf) -> Installation {
        let Self {
            guest,
            libkrunfw,
            qemu,
            virtiofsd,
            vhost_device_vsock,
            passt,
        } = self.clone();
        Installation {
            guest,
            libkrunfw,
            qemu,
            virtiofsd,
            vhost_device_vsock,
            passt,
            cache,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_of_program_is_above_its_bin() {
        let prefix = |exe: &str| prefix_of(Path::new(exe));
        assert_eq!(prefix("/opt/boxlite/bin/x"), Some("/opt/boxlite".into()));
        assert_eq!(prefix("/usr/bin/x"), Some("/usr".into()));
        assert_eq!(prefix("/src/target/debug/x"), None);
        assert_eq!(prefix("/x"), None);
    }

    #[test]
    fn kernel_of_an_installation_precedes_debians() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Paths::below(dir.path()).libkrunfw, Path::new(DEBIAN_KERNEL));
        let kernel = installed_kernel(dir.path());
        std::fs::create_dir_all(kernel.parent().unwrap()).unwrap();
        std::fs::write(&kernel, "").unwrap();
        assert_eq!(Paths::below(dir.path()).libkrunfw, kernel);
    }
}
