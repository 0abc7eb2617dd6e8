//! The parts of `containerd-shim-boxlite-v2` that hold a VM, as a library, so that tests can call them.
//!
//! The ttrpc services, the command line and the log writers are in here too, but know no VMM; only the module `vmm`
//! does. No image, no database: a shim is told every path.

pub mod jail;
pub mod net;
pub mod probe;
pub mod roles;
pub mod share;
pub mod vmm;
