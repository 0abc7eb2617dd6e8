//! What the shim's role `probe` prints, as JSON on standard output: whether this machine runs guest code on KVM.
//!
//! Facts only; which VMM follows from them is decided in runtime's `vmm_probe`.

use serde::{Deserialize, Serialize};

/// The answer of `containerd-shim-boxlite-v2 probe`. Exit code 0 whatever it says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Whether /dev/kvm exists.
    pub kvm_present: bool,
    /// Whether a throw-away VM on it ran the test instructions to their end.
    pub kvm_usable: bool,
    /// Why not, or what ran; one line.
    pub reason: String,
}
