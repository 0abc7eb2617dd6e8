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

/// CRI v1 as published for Kubernetes 1.37 (`cri/v1/api.proto`).
#[cfg(feature = "cri")]
pub mod cri {
    /// Version 1; the proto package is `runtime.v1`.
    pub mod v1 {
        tonic::include_proto!("runtime.v1");

        /// Omits the secrets, as `debug_redact` of the published interface requires.
        impl std::fmt::Debug for AuthConfig {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct("AuthConfig")
                    .field("username", &self.username)
                    .field("server_address", &self.server_address)
                    .finish_non_exhaustive()
            }
        }

        #[cfg(test)]
        mod tests {
            use super::*;

            #[test]
            fn auth_config_debug_omits_secrets() {
                let secret = || "hunter2".to_owned();
                let auth = AuthConfig {
                    username: "me".into(),
                    password: secret(),
                    auth: secret(),
                    server_address: "registry.test".into(),
                    identity_token: secret(),
                    registry_token: secret(),
                };
                let text = format!("{auth:?}");
                assert!(
                    text.contains("registry.test") && !text.contains("hunter2"),
                    "{text}"
                );
            }
        }
    }
}

/// The messages of NRI as published with 0.12.5 (`nri/v1alpha1/api.proto`).
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
