//! [`Plan`]: what CreateSandbox asked for, checked.
//!
//! boxlite-cri sends [`SandboxOptions`] as JSON. A containerd sends CRI's pod configuration, or calls no CreateSandbox at
//! all; [`crate::containerd`] makes plans out of that.

use crate::error::{Result, ShimError};
use boxlite_proto::names::SANDBOX_OPTIONS_TYPE;
use boxlite_proto::vmm::{SandboxOptions, VmmKind};
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use std::path::PathBuf;

/// Largest options accepted, in bytes.
const OPTIONS_LIMIT: usize = 1 << 20;

/// Who described the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// boxlite-cri, by CreateSandbox.
    Boxlite,
    /// containerd's `sandboxer = "shim"`, by CreateSandbox.
    Sandboxer,
    /// Nobody: a containerd's first Task.Create stands for it, and the last task's end ends the VM.
    Task,
}

impl Origin {
    /// Whether tasks show the VM's pid on the host instead of theirs in the guest. A containerd's clients take a task's pid
    /// for one of this machine and would look up, or configure, a stranger's namespaces.
    pub fn shows_host_pid(self) -> bool {
        self != Self::Boxlite
    }
}

/// The pod to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The VM's options.
    pub options: SandboxOptions,
    /// The pod's network namespace; None: no network.
    pub netns: Option<PathBuf>,
    /// Who asked.
    pub origin: Origin,
    /// Whether the pod's TCP ports are to be reached on the loopback of `netns`, where containerd's CRI plugin dials.
    pub local_ports: bool,
    /// Whether every container is shown the node's IPC objects. boxlite-cri asks for that in a container's own spec.
    pub host_ipc: bool,
}

impl Plan {
    /// Reads a request.
    ///
    /// # Errors
    /// Invalid, naming the field.
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
                "type {kind:?}, {SANDBOX_OPTIONS_TYPE:?} is wanted"
            )));
        }
        if any.value.len() > OPTIONS_LIMIT {
            return Err(invalid(format!(
                "{} bytes, at most {OPTIONS_LIMIT}",
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
                reason: "a pod in the host's network has no namespace of its own".to_owned(),
            });
        }
        if options.host_network && !matches!(options.vmm, VmmKind::Krun | VmmKind::Qemu) {
            return Err(ShimError::Unsupported {
                what: "the host's network on this VMM",
            });
        }
        Ok(Self {
            options,
            netns,
            origin: Origin::Boxlite,
            local_ports: false,
            host_ipc: false,
        })
    }
}

/// The network namespace of a request.
///
/// # Errors
/// Invalid for a path that is not absolute.
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
