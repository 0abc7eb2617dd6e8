//! Wire types and names shared by boxlite processes.
//!
//! Contains no behavior except parsing and printing; no I/O and no async code.
//!
//! `boxlite::v1` is the guest protocol, `cri::v1` the kubelet's, `nri::v1alpha1` that of NRI plugins, `shim` the ttrpc
//! extension of the shim, and [`vmm`] the description of a VM that the shim passes to its vmm child.

// Not `forbid`: ttrpc's generated code sets its own level.
#![deny(unsafe_code)]

pub mod error;
pub mod exit;
pub mod names;
pub mod probe;
pub mod vmm;

/// The guest protocol (`boxlite/v1/service.proto`).
pub mod boxlite {
    /// Version 1.
    #[expect(
        clippy::doc_overindented_list_items,
        clippy::large_enum_variant,
        reason = "generated from the .proto"
    )]
    #[allow(
        unfulfilled_lint_expectations,
        reason = "depends on the generator's version"
    )]
    pub mod v1 {
        tonic::include_proto!("boxlite.v1");
    }
}

/// CRI v1 as published for Kubernetes 1.36 (`cri/v1/api.proto`).
#[cfg(feature = "cri")]
pub mod cri {
    /// Version 1; the proto package is `runtime.v1`.
    pub mod v1 {
        tonic::include_proto!("runtime.v1");
    }
}

/// The messages of NRI as published with 0.12 (`nri/v1alpha1/api.proto`).
#[cfg(feature = "nri")]
pub mod nri {
    /// The proto package is `nri.pkg.api.v1alpha1`.
    pub mod v1alpha1 {
        tonic::include_proto!("nri.pkg.api.v1alpha1");
    }
}

/// The shim's ttrpc extension (`boxlite/v1/shim.proto`).
#[cfg(feature = "shim")]
pub mod shim {
    include!(concat!(env!("OUT_DIR"), "/shim/mod.rs"));
}
