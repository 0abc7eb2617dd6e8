//! What a VM is made of, as data: VmmKind, InstanceSpec (shim → vmm child) and SandboxOptions (boxlite-cri → shim).
//!
//! Nothing here starts anything; shim-v2's `vmm` module does.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Virtual machine monitor of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmmKind {
    /// libkrun, in process, on KVM.
    Krun,
    /// QEMU microvm, with TCG or KVM.
    Qemu,
}

impl VmmKind {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Krun, Self::Qemu];

    /// Name in configuration files, annotations and messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Krun => "krun",
            Self::Qemu => "qemu",
        }
    }
}

impl fmt::Display for VmmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is not the name of a [`VmmKind`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid VMM {0:?}: must be krun or qemu")]
pub struct UnknownVmmKind(String);

impl FromStr for VmmKind {
    type Err = UnknownVmmKind;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let kind = Self::ALL.into_iter().find(|kind| kind.name() == name);
        kind.ok_or_else(|| UnknownVmmKind(name.to_owned()))
    }
}

/// How QEMU runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// Emulation; works everywhere.
    #[default]
    Tcg,
    /// Hardware virtualization.
    Kvm,
}

/// Files and programs of the installation that a VM needs. All absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Installation {
    /// The static agent binary, `boxlite-guest`.
    pub guest: PathBuf,
    /// `libkrunfw.so.5`: the guest kernel.
    pub libkrunfw: PathBuf,
    /// `qemu-system-x86_64` (Qemu only).
    pub qemu: PathBuf,
    /// `virtiofsd` (Qemu only; libkrun brings its own).
    pub virtiofsd: PathBuf,
    /// `vhost-device-vsock` (Qemu only).
    pub vhost_device_vsock: PathBuf,
    /// Directory for what is derived from these once and kept: the agent's EROFS image, the kernel's ELF wrapper, the
    /// ext4 template.
    pub cache: PathBuf,
}

/// A block device of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Raw image or block device on the host.
    pub path: PathBuf,
    /// At most 20 bytes; the guest finds the disk by it.
    pub serial: String,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// A network card of the VM, on a tap that exists already.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Name of the tap in [`InstanceSpec::netns`].
    pub tap: String,
    /// aa:bb:cc:dd:ee:ff, as the guest sees it.
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
}

/// One VM, as the shim hands it to its vmm child on standard input (JSON).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceSpec {
    /// Sandbox id; for messages only.
    pub id: String,
    /// Chooses the VMM.
    pub kind: VmmKind,
    /// Virtual CPUs, at least 1.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// TCG or KVM (Qemu only).
    pub acceleration: Acceleration,
    /// Files and programs.
    pub installation: Installation,
    /// Private directory (0700) of this VM: sockets and console log, by the names in [`crate::names`].
    pub work_dir: PathBuf,
    /// Directory that the virtiofs share serves, in the vmm child's mount namespace.
    pub share_dir: PathBuf,
    /// Data disks in order; the root, where the VMM needs one, is its own affair.
    pub disks: Vec<Disk>,
    /// Network cards in order.
    pub nics: Vec<Nic>,
    /// Network namespace in which the taps are, to be entered before the VM starts.
    pub netns: Option<PathBuf>,
    /// Whether the guest's connections are the host's own: TSI (Krun), a user-mode card (Qemu). Without netns and nics.
    #[serde(default)]
    pub host_network: bool,
    /// Whether the guest's kernel prints its boot messages on the console.
    pub debug_console: bool,
}

/// What boxlite-cri asks of a sandbox: the `options` of CreateSandbox, as JSON under
/// [`crate::names::SANDBOX_OPTIONS_TYPE`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxOptions {
    /// Chooses the VMM.
    pub vmm: VmmKind,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB, the agent's overhead included.
    pub memory_mib: u32,
    /// Size of the sparse scratch disk in bytes.
    pub scratch_bytes: u64,
    /// Directory of the scratch disk, on a disk; None: in `work` of the bundle, where containerd links its own directory.
    #[serde(default)]
    pub scratch_dir: Option<PathBuf>,
    /// TCG or KVM (Qemu only).
    pub acceleration: Acceleration,
    /// Hostname inside the pod.
    pub hostname: String,
    /// Sysctls by dotted name.
    pub sysctls: std::collections::BTreeMap<String, String>,
    /// Files and programs.
    pub installation: Installation,
    /// Cgroup (v1 or v2 path below each controller's mount) for shim and VMM; empty: where the shim is.
    pub cgroup_parent: String,
    /// Kernel messages on the console.
    pub debug_console: bool,
    /// A pod in the host's network; then the request names no network namespace.
    #[serde(default)]
    pub host_network: bool,
}
