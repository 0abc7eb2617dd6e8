//! [`Plan`]: the validated request of a CreateSandbox.
//!
//! boxlite-cri sends [`SandboxOptions`] as JSON. containerd sends CRI's pod configuration or does not call CreateSandbox;
//! [`crate::containerd`] builds plans for those cases.

use crate::error::{Result, ShimError};
use boxlite_proto::names::SANDBOX_OPTIONS_TYPE;
use boxlite_proto::vmm::SandboxOptions;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use std::path::PathBuf;

/// Maximum size of the options.
const MAX_OPTIONS_BYTES: usize = 1 << 20;

/// Client that owns the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxOwner {
    /// boxlite-cri, by CreateSandbox.
    Boxlite,
    /// containerd's `sandboxer = "shim"`, by CreateSandbox.
    Sandboxer,
    /// containerd without CreateSandbox: the first Task.Create creates the sandbox, the end of the last task stops the VM.
    Task,
}

impl SandboxOwner {
    /// Returns whether tasks report the VM's pid on the host instead of their pid in the guest. Clients of containerd treat
    /// a task's pid as one of this host and would inspect, or configure, the namespaces of an unrelated process.
    pub fn reports_host_pid(self) -> bool {
        self != Self::Boxlite
    }
}

/// Plan of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Options of the VM.
    pub options: SandboxOptions,
    /// Network namespace of the pod; None without a network.
    pub netns: Option<PathBuf>,
    /// Client that owns the sandbox.
    pub owner: SandboxOwner,
    /// True if the pod's TCP ports are reachable on the loopback of `netns`, which containerd's CRI plugin dials.
    pub local_ports: bool,
    /// True if every container sees the node's IPC objects. boxlite-cri requests that in each container's spec.
    pub host_ipc: bool,
}

impl Plan {
    /// Parses and validates a request of boxlite-cri.
    ///
    /// # Errors
    /// Invalid with the field's name.
    pub fn from_request(request: &CreateSandboxRequest) -> Result<Self> {
        let invalid = |reason: String| ShimError::Invalid {
            field: "options",
            reason,
        };
        let any = request
            .options
            .as_ref()
            .ok_or_else(|| invalid("missing".to_owned()))?;
        let kind = any.type_url.rsplit('/').next().unwrap_or_default();
        if kind != SANDBOX_OPTIONS_TYPE {
            return Err(invalid(format!(
                "unexpected type {kind:?}, expected {SANDBOX_OPTIONS_TYPE:?}"
            )));
        }
        if any.value.len() > MAX_OPTIONS_BYTES {
            return Err(invalid(format!(
                "{} bytes exceed the maximum of {MAX_OPTIONS_BYTES}",
                any.value.len()
            )));
        }
        let options: SandboxOptions =
            serde_json::from_slice(&any.value).map_err(|error| invalid(error.to_string()))?;
        if options.vcpus == 0 {
            return Err(invalid("vcpus is 0".to_owned()));
        }
        let netns = netns(request)?;
        if options.host_network && netns.is_some() {
            return Err(ShimError::Invalid {
                field: "netns_path",
                reason: "must be empty for a pod in the host's network".to_owned(),
            });
        }
        Ok(Self {
            options,
            netns,
            owner: SandboxOwner::Boxlite,
            local_ports: false,
            host_ipc: false,
        })
    }
}

/// Returns the network namespace of a request.
///
/// # Errors
/// Invalid for a relative path.
pub fn netns(request: &CreateSandboxRequest) -> Result<Option<PathBuf>> {
    let netns = (!request.netns_path.is_empty()).then(|| PathBuf::from(&request.netns_path));
    if netns.as_ref().is_some_and(|path| !path.is_absolute()) {
        return Err(ShimError::Invalid {
            field: "netns_path",
            reason: format!("{:?} is not absolute", request.netns_path),
        });
    }
    Ok(netns)
}
