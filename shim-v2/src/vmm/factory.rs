//! [`VmmFactory`]: maps a VmmKind to a Vmm and its capabilities.
//!
//! boxlite-cri chooses the kind of a pod, with the probe's result.

use super::{Vmm, VmmCapabilities, krun, qemu};
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::vmm::VmmKind;
use std::collections::BTreeMap;

type Make = Box<dyn Fn() -> Box<dyn Vmm> + Send + Sync>;

/// The VMMs known to this process.
pub struct VmmFactory {
    entries: BTreeMap<VmmKind, (VmmCapabilities, Make)>,
}

impl VmmFactory {
    /// Returns a factory without VMMs.
    pub fn empty() -> Self {
        Self {
            entries: BTreeMap::new(),
        }
    }

    /// Returns a factory with Krun and Qemu.
    pub fn standard() -> Self {
        let mut factory = Self::empty();
        factory.register(VmmKind::Krun, krun::CAPABILITIES, || {
            Box::new(krun::KrunVmm)
        });
        factory.register(VmmKind::Qemu, qemu::CAPABILITIES, || {
            Box::new(qemu::QemuVmm)
        });
        factory
    }

    /// Registers a VMM, replacing one of the same kind.
    pub fn register<F>(&mut self, kind: VmmKind, capabilities: VmmCapabilities, make: F)
    where
        F: Fn() -> Box<dyn Vmm> + Send + Sync + 'static,
    {
        self.entries.insert(kind, (capabilities, Box::new(make)));
    }

    /// Returns the capabilities of a kind; None if it is not registered.
    pub fn capabilities(&self, kind: &VmmKind) -> Option<VmmCapabilities> {
        self.entries
            .get(kind)
            .map(|(capabilities, _)| *capabilities)
    }

    /// Creates a Vmm of a kind.
    ///
    /// # Errors
    /// The kind is not registered.
    pub fn make(&self, kind: &VmmKind) -> BoxliteResult<Box<dyn Vmm>> {
        match self.entries.get(kind) {
            Some((_, make)) => Ok(make()),
            None => Err(BoxliteError::UnknownVmm { kind: kind.clone() }),
        }
    }
}
