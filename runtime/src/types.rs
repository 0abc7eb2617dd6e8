//! Options of boxes and containers, and snapshots of their state. Plain data.
//!
//! CRI types end at cri-server's `convert`; OCI types (the container's spec) are passed through.

use crate::metrics::StageTimers;
use boxlite_proto::vmm::{
    Acceleration, IdRange, Installation, PodName, SharedVolumeWriters, VmmKind,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Options of a runtime.
#[derive(Debug, Clone)]
pub struct RuntimeOptions {
    /// Persistent directory (0700): database, images.
    pub root: PathBuf,
    /// Directory of the present boot (0700): bundles, sockets. Must be short, because socket paths contain it.
    pub state: PathBuf,
    /// Directory of the scratch disks, on a disk; `None` for `<root>/scratch`.
    pub scratch_dir: Option<PathBuf>,
    /// Path of `containerd-shim-boxlite-v2`.
    pub shim: PathBuf,
    /// Files and programs of a VM.
    pub installation: Installation,
    /// VMM of boxes that do not select one. [`crate::vmm_probe`] resolves "auto" to this.
    pub vmm: VmmKind,
    /// TCG or KVM (QEMU only).
    pub acceleration: Acceleration,
    /// Timeout of StartSandbox. The death of the VMM ends the wait at once, so this applies to hung guests only; the
    /// kubelet's timeout of RunPodSandbox is 4 minutes.
    pub start_limit: std::time::Duration,
    /// Registries, mirrors and credentials of image pulls.
    pub registry: crate::images::RegistryOptions,
}

/// Options of a box. Persisted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxOptions {
    /// Id chosen by the caller, 64 hex digits.
    pub id: String,
    /// Unique name; a second creation with the same name returns the existing box.
    pub name: String,
    /// The caller's opaque data (0600 on disk).
    pub metadata: Vec<u8>,
    /// Names of the pod, for logs; `None` for a box that is not a pod.
    #[serde(default)]
    pub pod: Option<PodName>,
    /// Virtual CPUs, at least 1.
    pub vcpus: u8,
    /// Guest memory in MiB, the agent's overhead included.
    pub memory_mib: u32,
    /// Memory limit of all containers together, in bytes, enforced by the guest; 0 for all that the guest can spare.
    #[serde(default)]
    pub containers_bytes: u64,
    /// Size of the sparse scratch disk, in bytes.
    pub scratch_bytes: u64,
    /// Hostname in the guest.
    pub hostname: String,
    /// Network namespace set up by CNI; `None` gives loopback only.
    pub netns: Option<PathBuf>,
    /// Use the host's network instead.
    #[serde(default)]
    pub host_network: bool,
    /// Give the VM a NIC that passt serves; without network namespace.
    #[serde(default)]
    pub passt: bool,
    /// Sysctls by dotted name.
    pub sysctls: BTreeMap<String, String>,
    /// Cgroup of shim and VMM; empty for boxlite-cri's cgroup.
    pub cgroup_parent: String,
    /// VMM; `None` for the runtime's default.
    pub vmm: Option<VmmKind>,
    /// Write kernel messages to the console log.
    pub debug_console: bool,
    /// Policy for host directories that another pod mounts with write access, too.
    #[serde(default)]
    pub shared_volume_writers: SharedVolumeWriters,
    /// User ids of the VMs; `None` for the shim's user.
    #[serde(default)]
    pub vmm_ids: Option<IdRange>,
}

/// Public state of a box; see the diagram in [`crate::box_state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BoxState {
    /// Registered, not started.
    Created,
    /// The start pipeline is running.
    Starting,
    /// The guest answers.
    Ready,
    /// The VM has ended or is being stopped.
    NotReady,
    /// Being removed.
    Removing,
}

/// Snapshot of a box.
#[derive(Debug, Clone)]
pub struct BoxSnapshot {
    /// See [`BoxOptions::id`].
    pub id: String,
    /// See [`BoxOptions::name`].
    pub name: String,
    /// State.
    pub state: BoxState,
    /// Reason why it is NotReady or why the last start failed; otherwise empty.
    pub reason: String,
    /// Creation time in ns since the epoch.
    pub created_at_ns: i64,
    /// The caller's opaque data.
    pub metadata: Vec<u8>,
    /// Stage timers of the last start.
    pub timers: StageTimers,
    /// Options with the present metadata.
    pub options: BoxOptions,
    /// VMM in use.
    pub vmm: VmmKind,
    /// Process id of the shim, once started.
    pub shim_pid: Option<i32>,
    /// Counters as last sampled.
    pub metrics: crate::metrics::BoxMetricsSnapshot,
}

/// Options of a container.
#[derive(Debug, Clone)]
pub struct ContainerOptions {
    /// Id chosen by the caller, 64 hex digits.
    pub id: String,
    /// Unique among the box's containers.
    pub name: String,
    /// Config digest of a pulled image, "sha256:…".
    pub image_id: String,
    /// OCI spec; mount sources are host paths, or image IDs for the mount type [`boxlite_proto::names::IMAGE_MOUNT`].
    pub spec: oci_spec::runtime::Spec,
    /// The caller's opaque data.
    pub metadata: Vec<u8>,
    /// CRI log file; `None` discards the output.
    pub log_path: Option<PathBuf>,
    /// Allow attaching stdin.
    pub stdin: bool,
    /// Close stdin after the first attached writer.
    pub stdin_once: bool,
    /// Allocate a terminal.
    pub tty: bool,
    /// PID namespace.
    pub pid_mode: PidMode,
    /// Container whose PID namespace is joined ([`PidMode::Target`]).
    pub pid_target: String,
    /// Make the root file system read-only.
    pub read_only_rootfs: bool,
}

/// PID namespace of a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidMode {
    /// A private one.
    #[default]
    Container,
    /// The pod's.
    Pod,
    /// That of another container.
    Target,
    /// The VM's root namespace, which contains the agent.
    Node,
}

/// State of a container; the names are CRI's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ContainerState {
    /// Created, not started.
    Created,
    /// The init process is running.
    Running,
    /// The init process has exited.
    Exited,
    /// The creation has not completed.
    Unknown,
}

impl fmt::Display for ContainerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Exited => "exited",
            Self::Unknown => "unknown",
        })
    }
}

/// Snapshot of a container. Times are in ns since the epoch, 0 if the event has not happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSnapshot {
    /// See [`ContainerOptions::id`].
    pub id: String,
    /// Id of its box.
    pub box_id: String,
    /// See [`ContainerOptions::name`].
    pub name: String,
    /// See [`ContainerOptions::image_id`].
    pub image_id: String,
    /// IDs of the images it mounts as volumes.
    #[serde(default)]
    pub image_volumes: Vec<String>,
    /// State.
    pub state: ContainerState,
    /// Registration time.
    pub created_at_ns: i64,
    /// Start time.
    pub started_at_ns: i64,
    /// Exit time.
    pub finished_at_ns: i64,
    /// Exit code, 0–255; 128 + signal after a fatal signal.
    pub exit_code: i32,
    /// Completed, Error, OOMKilled, StartError or Unknown; empty before the exit.
    pub reason: String,
    /// Detail of `reason`.
    pub message: String,
    /// The caller's opaque data.
    pub metadata: Vec<u8>,
    /// CRI log file.
    pub log_path: Option<PathBuf>,
    /// See [`ContainerOptions::tty`].
    pub tty: bool,
    /// See [`ContainerOptions::stdin`].
    pub stdin: bool,
    /// See [`ContainerOptions::stdin_once`].
    pub stdin_once: bool,
    /// User of the init process; `None` before the creation.
    #[serde(default)]
    pub user: Option<ContainerUser>,
}

/// User of a container's init process, as resolved by the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplemental groups, sorted, including the primary group.
    pub supplemental_groups: Vec<u32>,
}

impl ContainerSnapshot {
    /// Returns the IDs of all images it uses.
    pub(crate) fn images(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.image_id).chain(&self.image_volumes)
    }
}
