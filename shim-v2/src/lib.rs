//! Library of `containerd-shim-boxlite-v2`, separate from the binary so that tests can call it.
//!
//! [`vmm`] implements the VMMs, [`jail`] confines them, [`probe`] tests for KVM, and [`machine`] assembles and boots a VM.
//! Outside [`vmm`] two modules distinguish kinds: [`machine`] by the NIC of a pod in the host's network, and [`containerd`] by
//! the acceleration of the configured kind. The shim has no image store and no database: callers pass all paths.

pub mod blocks;
pub mod cgroup;
pub mod cli;
pub mod connections;
pub mod container;
pub mod containerd;
pub mod daemon;
pub mod error;
pub mod events;
pub mod flags;
pub mod fuse;
pub mod jail;
pub mod logs;
pub mod machine;
pub mod mount_export;
pub mod net;
pub mod pod;
pub mod probe;
pub mod roles;
pub mod sandbox;
pub mod service;
pub mod share;
pub mod shim_state;
pub mod time;
pub mod trace;
pub mod vmm;
