//! The VMM boundary: [`Vmm`] turns an InstanceSpec into a [`VmmInstance`], [`VmmFactory`] finds the Vmm of a kind.
//!
//! A Vmm configures and starts a VM. It has no notion of pods, containers or images and no call for a running VM: after boot,
//! everything goes through the share or vsock.
//!
//! Flow: the shim's [`supervisor`] starts the vmm child ([`child`]) → `VmmFactory::make` → `Vmm::create` (still sees the
//! host: checks, caches, opens) → the jail is entered → `VmmInstance::enter`, which does not return.

pub mod child;
pub mod console;
pub mod devices;
mod factory;
pub mod krun;
mod krunfw;
mod parent;
pub mod passt;
pub mod qemu;
pub mod ready;
mod step;
pub mod supervisor;
pub mod work_dir;

pub use factory::VmmFactory;
pub use ready::{BootError, ReadySocket};
pub use supervisor::{Supervisor, VmmChild, VmmExit};

use crate::jail::HostFiles;
use boxlite_proto::error::BoxliteResult;
use boxlite_proto::vmm::InstanceSpec;
use std::convert::Infallible;

/// Properties of a VMM, known without creating one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmmCapabilities {
    /// Number of device slots, including built-in devices.
    pub max_devices: usize,
    /// Number of slots taken by built-in devices.
    pub base_devices: usize,
}

/// A virtual machine monitor.
pub trait Vmm {
    /// Turns the spec into an instance ready to be entered. Runs before the jail is entered, with the whole host visible; files
    /// opened here remain open.
    ///
    /// # Errors
    /// The spec requests something this VMM does not support, or a required file is missing.
    fn create(&mut self, spec: InstanceSpec) -> BoxliteResult<VmmInstance>;
}

/// State of a VMM between create and enter.
pub trait VmmInstanceImpl {
    /// Returns the files that must be visible inside the jail.
    fn host_files(&self) -> HostFiles;
    /// Runs the VM in this process, inside the jail; see [`VmmInstance::enter`].
    fn enter(self: Box<Self>) -> BoxliteResult<Infallible>;
}

/// A configured VM that has not been started.
pub struct VmmInstance(Box<dyn VmmInstanceImpl>);

impl VmmInstance {
    /// Wraps a VMM's state.
    pub fn new(state: impl VmmInstanceImpl + 'static) -> Self {
        Self(Box::new(state))
    }

    /// Returns the files that must be visible inside the jail.
    pub fn host_files(&self) -> HostFiles {
        self.0.host_files()
    }

    /// Runs the VM. The process exits with it; returns only if the VM could not be started.
    ///
    /// # Errors
    /// The VM could not be started.
    pub fn enter(self) -> BoxliteResult<Infallible> {
        self.0.enter()
    }
}

#[cfg(test)]
mod tests;
