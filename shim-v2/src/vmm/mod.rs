//! The VMM boundary: [`Vmm`] makes a [`VmmInstance`] out of an InstanceSpec, [`VmmFactory`] finds the Vmm of a kind.
//!
//! A Vmm configures and enters; it knows no pod, no container, no image, and has no call for a running VM: what comes
//! after boot comes through the share or through vsock. Keep it that small.
//!
//! Flow: the shim's [`supervisor`] starts the vmm child ([`child`]) → `VmmFactory::make` → `Vmm::create` (still sees the
//! host: checks, caches, opens) → the jail closes → `VmmInstance::enter`, which never returns.

pub mod child;
pub mod console;
pub mod devices;
mod factory;
pub mod krun;
mod krunfw;
pub mod qemu;
pub mod ready;
mod step;
pub mod supervisor;

pub use factory::{VmmCapabilities, VmmFactory};
pub use ready::{BootError, ReadySocket};
pub use supervisor::{Supervisor, VmmChild, VmmExit};

use crate::jail::HostFiles;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::convert::Infallible;

/// A virtual machine monitor.
pub trait Vmm {
    /// Turns the spec into an instance that is ready to be entered. Runs before the jail closes, with the whole host in
    /// sight; everything it opens stays open.
    ///
    /// # Errors
    /// The spec asks for what this VMM has not, or a file it needs is missing.
    fn create(&mut self, spec: InstanceSpec) -> BoxliteResult<VmmInstance>;
}

/// What a VMM keeps between create and enter.
pub trait VmmInstanceImpl {
    /// The files that must be visible once the jail has closed.
    fn host_files(&self) -> HostFiles;
    /// Runs the VM in this process, inside the jail. See [`VmmInstance::enter`].
    fn enter(self: Box<Self>) -> BoxliteResult<Infallible>;
}

/// A configured VM that has not started.
pub struct VmmInstance(Box<dyn VmmInstanceImpl>);

impl VmmInstance {
    /// Wraps a VMM's own state.
    pub fn new(state: impl VmmInstanceImpl + 'static) -> Self {
        Self(Box::new(state))
    }

    /// The files that must be visible once the jail has closed.
    pub fn host_files(&self) -> HostFiles {
        self.0.host_files()
    }

    /// Becomes the VM. The process ends with it; only a failure to start comes back.
    ///
    /// # Errors
    /// The VM could not be started.
    pub fn enter(self) -> BoxliteResult<Infallible> {
        self.0.enter()
    }
}

#[cfg(test)]
mod tests;
