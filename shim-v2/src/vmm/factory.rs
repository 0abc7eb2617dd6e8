//! [`VmmFactory`]: from VmmKind to a Vmm and what it can do.
//!
//! It decides nothing: which kind a pod gets is boxlite-cri's choice, made with the probe's answer.

use super::{Vmm, krun, qemu};
use boxlite_proto::error::{BoxliteError, BoxliteResult};
use boxlite_proto::vmm::VmmKind;
use std::collections::BTreeMap;

/// What a caller may ask about a VMM before it makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmmCapabilities {
    /// Device slots, those the VMM fills itself included.
    pub max_devices: usize,
    /// How many of them are taken before the pod's first disk or card.
    pub base_devices: usize,
}

type Make = Box<dyn Fn() -> Box<dyn Vmm> + Send + Sync>;

/// The VMMs this process knows.
pub struct VmmFactory {
    entries: BTreeMap<VmmKind, (VmmCapabilities, Make)>,
}

impl VmmFactory {
    /// With nothing registered.
    pub fn empty() -> Self {
        Self {
            entries: BTreeMap::new(),
        }
    }

    /// With Krun and Qemu.
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

    /// Adds a VMM, or replaces the one of that kind.
    pub fn register<F>(&mut self, kind: VmmKind, capabilities: VmmCapabilities, make: F)
    where
        F: Fn() -> Box<dyn Vmm> + Send + Sync + 'static,
    {
        self.entries.insert(kind, (capabilities, Box::new(make)));
    }

    /// What the VMM of that kind can do. None: there is none.
    pub fn capabilities(&self, kind: &VmmKind) -> Option<VmmCapabilities> {
        self.entries
            .get(kind)
            .map(|(capabilities, _)| *capabilities)
    }

    /// A Vmm of that kind.
    ///
    /// # Errors
    /// None is registered.
    pub fn make(&self, kind: &VmmKind) -> BoxliteResult<Box<dyn Vmm>> {
        match self.entries.get(kind) {
            Some((_, make)) => Ok(make()),
            None => Err(BoxliteError::UnknownVmm { kind: kind.clone() }),
        }
    }
}
