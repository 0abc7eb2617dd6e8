//! Policy that both ways in share: boxlite-cri, and the shim under containerd.
//!
//! ```text
//! section, value   read a TOML table and report every mistake in it
//! paths            programs and files of the installation: [paths]
//! pod              defaults of a pod's VM: [pod]
//! network          network of pods without CNI: [network]
//! vmm              choice of VMM and acceleration: vmm, acceleration
//! budget           memory of guest, containers and host processes
//! vmm_probe        VMM for a probe's answer, and the file that keeps it
//! size             VM size of a pod, and capacity checks of later updates
//! cgroup           cgroup names of both drivers, memory limit of a pod's cgroup
//! dns              resolv.conf of a pod
//! ```
//!
//! Synchronous, and free of CRI and OCI types: callers convert their messages first.

#![forbid(unsafe_code)]

pub mod budget;
pub mod cgroup;
pub mod dns;
pub mod network;
pub mod paths;
pub mod pod;
pub mod section;
pub mod size;
pub mod value;
pub mod vmm;
pub mod vmm_probe;
