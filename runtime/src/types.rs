//! What callers hand in and get back: options of boxes and containers, and snapshots of their state. Plain data.
//!
//! CRI types stop at cri-server's convert; OCI types (the container's spec) go through.

use crate::metrics::StageTimers;
use boxlite_proto::vmm::{Acceleration, Installation, VmmKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// How a runtime is opened.
#[derive(Debug, Clone)]
pub struct RuntimeOptions {
    /// Persistent directory (0700): database, images.
    pub root: PathBuf,
    /// Directory of the present boot (0700): bundles, sockets. Short: socket paths grow out of it.
    pub state: PathBuf,
    /// Directory of the scratch disks, on a disk. None: `<root>/scratch`.
    pub scratch_dir: Option<PathBuf>,
    /// `containerd-shim-boxlite-v2`.
    pub shim: PathBuf,
    /// Files and programs of a VM.
    pub installation: Installation,
    /// VMM of boxes that don't ask for one. Resolved already: [`crate::vmm_probe`] turns "auto" into this.
    pub vmm: VmmKind,
    /// TCG or KVM (Qemu only).
    pub acceleration: Acceleration,
    /// Longest boot of a VM, from StartSandbox to its answer. VMM death ends the wait at once, so this is only for a
    /// guest that hangs; the kubelet gives a RunPodSandbox 4 minutes.
    pub start_limit: std::time::Duration,
    /// Registries, mirrors and credentials of image pulls.
    pub registry: crate::images::RegistryOptions,
}

/// A box as its creator wants it. Persisted as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxOptions {
    /// 64 hex digits, the caller's choice.
    pub id: String,
    /// Unique key among boxes; a second create with the same name and id joins the first.
    pub name: String,
    /// The caller's own data, kept and given back unread (0600 on disk).
    pub metadata: Vec<u8>,
    /// Virtual CPUs, at least 1.
    pub vcpus: u8,
    /// Guest memory in MiB, the agent's overhead included.
    pub memory_mib: u32,
    /// Size of the sparse scratch disk, in bytes.
    pub scratch_bytes: u64,
    /// Hostname in the guest.
    pub hostname: String,
    /// Network namespace that CNI filled; `None`: no network but loopback.
    pub netns: Option<PathBuf>,
    /// In the host's network instead.
    #[serde(default)]
    pub host_network: bool,
    /// Sysctls by dotted name.
    pub sysctls: BTreeMap<String, String>,
    /// Cgroup for shim and VMM; empty: boxlite-cri's own.
    pub cgroup_parent: String,
    /// Another VMM than the runtime's.
    pub vmm: Option<VmmKind>,
    /// Kernel messages on the console log.
    pub debug_console: bool,
}

/// Where a box is in its life; see the diagram in [`crate::management::box_state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BoxState {
    /// Registered, nothing runs.
    Created,
    /// The start pipeline is at work.
    Starting,
    /// The guest answers.
    Ready,
    /// The VM is gone or going.
    NotReady,
    /// Being taken apart.
    Removing,
}

/// A box at one moment.
#[derive(Debug, Clone)]
pub struct BoxSnapshot {
    /// See [`BoxOptions::id`].
    pub id: String,
    /// See [`BoxOptions::name`].
    pub name: String,
    /// State.
    pub state: BoxState,
    /// Why it is NotReady, or why the last start failed; empty otherwise.
    pub reason: String,
    /// ns since the epoch.
    pub created_at_ns: i64,
    /// The caller's own data.
    pub metadata: Vec<u8>,
    /// Stages of the last start.
    pub timers: StageTimers,
    /// As created.
    pub options: BoxOptions,
    /// VMM in use.
    pub vmm: VmmKind,
    /// Shim's process id, once there is one.
    pub shim_pid: Option<i32>,
    /// What the box was doing when last measured.
    pub metrics: crate::metrics::BoxMetricsSnapshot,
}

/// A container as its creator wants it.
#[derive(Debug, Clone)]
pub struct ContainerOptions {
    /// 64 hex digits, the caller's choice.
    pub id: String,
    /// Unique among the box's containers.
    pub name: String,
    /// Config digest of a pulled image, "sha256:…".
    pub image_id: String,
    /// OCI spec; mount sources are host paths, or image IDs where the type is [`boxlite_proto::names::IMAGE_MOUNT`].
    pub spec: oci_spec::runtime::Spec,
    /// The caller's own data, kept and given back unread.
    pub metadata: Vec<u8>,
    /// CRI log file; `None`: output is read and thrown away.
    pub log_path: Option<PathBuf>,
    /// Whether it has a stdin to attach to.
    pub stdin: bool,
    /// Whether stdin ends with the first attached writer.
    pub stdin_once: bool,
    /// Whether it has a terminal.
    pub tty: bool,
    /// PID namespace.
    pub pid_mode: PidMode,
    /// Container whose PID namespace is joined ([`PidMode::Target`]).
    pub pid_target: String,
    /// No writable layer.
    pub read_only_rootfs: bool,
}

/// Which PID namespace a container lives in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PidMode {
    /// Its own.
    #[default]
    Container,
    /// The pod's.
    Pod,
    /// That of another container.
    Target,
    /// The VM's own, with the agent in it.
    Node,
}

/// State of a container; the names are CRI's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ContainerState {
    /// Made, not started.
    Created,
    /// Its init process runs.
    Running,
    /// It ended.
    Exited,
    /// Its creation was cut off.
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

/// A container at one moment. Times are ns since the epoch, 0 where it has not happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSnapshot {
    /// See [`ContainerOptions::id`].
    pub id: String,
    /// Its box.
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
    /// When it was registered.
    pub created_at_ns: i64,
    /// When its process was let go.
    pub started_at_ns: i64,
    /// When it ended.
    pub finished_at_ns: i64,
    /// 0–255; a death by signal is 128 + signal.
    pub exit_code: i32,
    /// Completed, Error, OOMKilled, StartError, Unknown; empty while it lives.
    pub reason: String,
    /// Detail of `reason`.
    pub message: String,
    /// The caller's own data.
    pub metadata: Vec<u8>,
    /// CRI log file.
    pub log_path: Option<PathBuf>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether it has a stdin.
    pub stdin: bool,
    /// Whether stdin ends with the first attached writer.
    pub stdin_once: bool,
    /// Whom its first process runs as; `None` until it is made.
    #[serde(default)]
    pub user: Option<ContainerUser>,
}

/// Whom a container's first process runs as, as the guest found it in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Sorted; the primary group is one of them.
    pub supplemental_groups: Vec<u32>,
}

impl ContainerSnapshot {
    /// All images it needs, by ID.
    pub(crate) fn images(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.image_id).chain(&self.image_volumes)
    }
}
