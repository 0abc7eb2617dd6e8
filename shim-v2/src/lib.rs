//! The parts of `containerd-shim-boxlite-v2` that hold a VM, as a library, so that tests can call them.
//!
//! The ttrpc services, the command line and the log writers are in here too, but know no VMM; only the module `vmm`
//! does, and `machine`, which puts a VM together. No image, no database: a shim is told every path.

pub mod blocks;
pub mod cgroup;
pub mod cli;
pub mod connections;
pub mod container;
pub mod containerd;
pub mod daemon;
pub mod error;
pub mod events;
pub mod fuse;
pub mod jail;
pub mod logs;
pub mod machine;
pub mod mount_export;
pub mod net;
pub mod pod;
pub mod probe;
pub mod record;
pub mod roles;
pub mod sandbox;
pub mod service;
pub mod share;
pub mod time;
pub mod vmm;
