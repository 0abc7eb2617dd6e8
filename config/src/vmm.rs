//! [`VmmSettings`]: the configured VMM and acceleration, the top-level keys `vmm` and `acceleration`.

use crate::section::Section;
use crate::value;
use boxlite_proto::vmm::{Acceleration, VmmKind};

/// Choice of VMM; `None` means `auto`: the hardware decides, since /dev/kvm may exist and yet run no guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmmSettings {
    /// The VMM. Default auto.
    pub kind: Option<VmmKind>,
    /// Acceleration of QEMU. Default auto: the probe's answer.
    pub acceleration: Option<Acceleration>,
}

impl VmmSettings {
    /// Reads both keys.
    pub fn read(top: &mut Section) -> Self {
        Self {
            kind: top.take("vmm", None, value::vmm),
            acceleration: top.take("acceleration", None, value::acceleration),
        }
    }
}
