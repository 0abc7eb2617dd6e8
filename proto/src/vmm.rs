//! Description of a VM: VmmKind, InstanceSpec (shim → vmm child) and SandboxOptions (boxlite-cri → shim).
//!
//! Data only; the `vmm` module of shim-v2 starts VMs.

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

    /// Returns the name in configuration files, annotations and messages.
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

/// An invalid name of a [`VmmKind`].
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

/// Execution mode of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// Emulation; works everywhere.
    #[default]
    Tcg,
    /// Hardware virtualization.
    Kvm,
}

/// Absolute paths of the files and programs that a VM needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Installation {
    /// The static agent binary, `boxlite-guest`.
    pub guest: PathBuf,
    /// `libkrunfw.so.5`: the guest kernel.
    pub libkrunfw: PathBuf,
    /// `qemu-system-x86_64` (Qemu only).
    pub qemu: PathBuf,
    /// `virtiofsd` (Qemu only; libkrun has its own).
    pub virtiofsd: PathBuf,
    /// `vhost-device-vsock` (Qemu only).
    pub vhost_device_vsock: PathBuf,
    /// `passt`, for a VM without CNI.
    #[serde(default)]
    pub passt: PathBuf,
    /// Directory of files derived once from these: the agent's EROFS image and the kernel's ELF wrapper.
    pub cache: PathBuf,
}

/// A block device of the VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Raw image or block device on the host.
    pub path: PathBuf,
    /// Serial, at most 20 bytes, by which the guest identifies the disk.
    pub serial: String,
    /// True for a read-only disk.
    pub read_only: bool,
}

/// A NIC of the VM on an existing tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Name of the tap in [`InstanceSpec::netns`].
    pub tap: String,
    /// MAC address in the guest, aa:bb:cc:dd:ee:ff.
    pub mac: String,
    /// MTU in bytes; 0 leaves it to the guest.
    pub mtu: u32,
}

/// A VM, as passed by the shim to its vmm child on standard input (JSON).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceSpec {
    /// Sandbox id, for messages.
    pub id: String,
    /// VMM to use.
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
    /// Data disks in order. The VMM provides the root disk, if it needs one.
    pub disks: Vec<Disk>,
    /// NICs in order.
    pub nics: Vec<Nic>,
    /// Network namespace of the taps, entered before the VM starts.
    pub netns: Option<PathBuf>,
    /// True if the guest uses the host's network: TSI (Krun) or a slirp NIC (Qemu). Without netns and nics.
    #[serde(default)]
    pub host_network: bool,
    /// True for a NIC that passt serves, in the network namespace of the shim. Without netns and nics.
    #[serde(default)]
    pub passt: bool,
    /// True to write the guest kernel's messages to the console.
    pub debug_console: bool,
    /// User and group id of the processes that serve no files: QEMU and its helpers, passt. `None`: those of the shim.
    #[serde(default)]
    pub user: Option<u32>,
}

/// A range of user and group ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    /// First id.
    pub first: u32,
    /// Number of ids, at least 1.
    pub count: u32,
}

impl IdRange {
    /// Ids of the VMs by default. systemd's table of ids assigns 1879048192 to 2147352575 to nothing.
    pub const DEFAULT: Self = Self {
        first: 1_879_048_192,
        count: 65_536,
    };
}

/// Allocation of an own user and group id to each VM of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmmUsers {
    /// File in which the shims of the node lock one byte per id.
    pub registry: PathBuf,
    /// Ids to allocate from.
    pub ids: IdRange,
}

/// Policy for a host directory that a second pod mounts with write access. File locks do not reach beyond a pod.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedVolumeWriters {
    /// The mount succeeds and a warning is logged.
    #[default]
    Warn,
    /// Creating the second pod's container fails.
    Refuse,
}

impl SharedVolumeWriters {
    /// Name in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Warn => "warn",
            Self::Refuse => "refuse",
        }
    }
}

/// Detection of host directories that another pod of the node mounts with write access, too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeWriters {
    /// File in which the shims of the node lock one byte per directory.
    pub registry: PathBuf,
    /// Reaction to the second pod.
    pub policy: SharedVolumeWriters,
}

/// Names of a pod in Kubernetes, for logs and traces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID; empty if it is not known.
    #[serde(default)]
    pub uid: String,
}

/// Options of a sandbox: the `options` of CreateSandbox, as JSON of type [`crate::names::SANDBOX_OPTIONS_TYPE`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxOptions {
    /// Names of the pod; `None` without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodName>,
    /// Chooses the VMM.
    pub vmm: VmmKind,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Guest memory in MiB, the agent's overhead included.
    pub memory_mib: u32,
    /// Memory limit of all containers together, in bytes, enforced by the guest; 0 for all that the guest can spare.
    #[serde(default)]
    pub containers_bytes: u64,
    /// Size of the sparse scratch disk in bytes.
    pub scratch_bytes: u64,
    /// Directory of the scratch disk, on a disk. `None`: `work` of the bundle, where containerd links its own directory.
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
    /// Cgroup of shim and VMM (v1 or v2 path below each controller's mount). Empty: the shim's current cgroup.
    pub cgroup_parent: String,
    /// True to write the guest kernel's messages to the console.
    pub debug_console: bool,
    /// True if the pod uses the host network; the request then has no network namespace.
    #[serde(default)]
    pub host_network: bool,
    /// True if passt serves the pod's NIC; the request then has no network namespace.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub passt: bool,
    /// Detection of directories that several pods write to. `None`: pods are not compared.
    #[serde(default)]
    pub volume_writers: Option<VolumeWriters>,
    /// Allocation of the VM's user. `None`: the VM runs as the shim's user.
    #[serde(default)]
    pub vmm_users: Option<VmmUsers>,
    /// True to boot a VM that has no pod yet; a second CreateSandbox with false gives it one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub warm: bool,
}
