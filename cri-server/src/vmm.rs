//! Which VMM runs pods, and the sentence that says why.

use crate::config::Config;
use boxlite_proto::vmm::{Acceleration, VmmKind};

/// No VMM can be had.
#[derive(Debug, thiserror::Error)]
pub enum ChoiceError {}

/// What was chosen.
#[derive(Debug, Clone)]
pub struct Choice {
    /// VMM.
    pub kind: VmmKind,
    /// How QEMU runs guest code.
    pub acceleration: Acceleration,
    /// Why.
    pub reason: String,
}

impl Choice {
    /// One line: reason, then what was chosen.
    pub fn sentence(&self) -> String {
        format!("{} → {}", self.reason, self.kind)
    }
}

/// Asks.
pub async fn choose(config: &Config) -> Result<Choice, ChoiceError> {
    Ok(Choice {
        kind: config.vmm.clone().unwrap_or(VmmKind::Qemu),
        acceleration: Acceleration::Tcg,
        reason: String::new(),
    })
}
