//! Output of the shim's role `probe`, JSON on standard output: whether this machine can run guest code on KVM.
//!
//! Facts only; boxlite-config's `vmm_probe` selects the VMM.

use serde::{Deserialize, Serialize};

/// Output of `containerd-shim-boxlite-v2 probe`. The exit code is always 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// True if /dev/kvm exists.
    pub kvm_present: bool,
    /// True if a temporary VM on it completed the test instructions.
    pub kvm_usable: bool,
    /// Reason or executed test, one line.
    pub reason: String,
}
