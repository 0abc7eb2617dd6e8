//! [`Plan`]: the validated request of a CreateSandbox.
//!
//! boxlite-cri sends [`SandboxOptions`] as JSON. containerd sends CRI's pod configuration or does not call CreateSandbox;
//! [`crate::containerd`] builds plans for those cases.

use crate::error::{Result, ShimError};
use boxlite_proto::names::SANDBOX_OPTIONS_TYPE;
use boxlite_proto::vmm::SandboxOptions;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use std::collections::BTreeMap;
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
    /// Returns whether a VM that was booted by the plan `warm` can be this plan's: nothing that a boot decides differs.
    pub fn fits(&self, warm: &Self) -> bool {
        let fixed = |plan: &Self| Self {
            options: SandboxOptions {
                pod: None,
                containers_bytes: 0,
                hostname: String::new(),
                sysctls: BTreeMap::new(),
                cgroup_parent: String::new(),
                volume_writers: None,
                warm: false,
                ..plan.options.clone()
            },
            ..plan.clone()
        };
        warm.options.warm && !self.options.warm && fixed(self) == fixed(warm)
    }

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
        if options.warm && netns.is_none() {
            return Err(ShimError::Invalid {
                field: "netns_path",
                reason: "required for a VM without a pod".to_owned(),
            });
        }
        if options.host_network && netns.is_some() {
            return Err(ShimError::Invalid {
                field: "netns_path",
                reason: "must be empty for a pod in the host's network".to_owned(),
            });
        }
        if options.passt && (netns.is_some() || options.host_network) {
            return Err(ShimError::Invalid {
                field: "netns_path",
                reason: "a pod with passt has no other network".to_owned(),
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

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::vmm::{Acceleration, Installation, VmmKind};

    fn plan() -> Plan {
        let file = || PathBuf::from("/x");
        Plan {
            options: SandboxOptions {
                pod: None,
                vmm: VmmKind::Qemu,
                vcpus: 1,
                memory_mib: 256,
                containers_bytes: 7,
                scratch_bytes: 1 << 30,
                scratch_dir: None,
                acceleration: Acceleration::Tcg,
                hostname: "pod".to_owned(),
                sysctls: [("a".to_owned(), "b".to_owned())].into(),
                installation: Installation {
                    guest: file(),
                    libkrunfw: file(),
                    qemu: file(),
                    virtiofsd: file(),
                    vhost_device_vsock: file(),
                    passt: file(),
                    cache: file(),
                },
                cgroup_parent: "/pod".to_owned(),
                debug_console: false,
                host_network: false,
                passt: false,
                volume_writers: None,
                vmm_users: None,
                warm: false,
            },
            netns: Some("/netns/x".into()),
            owner: SandboxOwner::Boxlite,
            local_ports: false,
            host_ipc: false,
        }
    }

    #[test]
    fn fits_compares_everything_that_a_boot_decides() {
        let mut warm = plan();
        warm.options.warm = true;
        warm.options.hostname.clear();
        warm.options.sysctls.clear();
        warm.options.cgroup_parent.clear();
        warm.options.containers_bytes = 0;
        assert!(plan().fits(&warm));
        assert!(!warm.fits(&warm), "not a pod's plan");
        assert!(!plan().fits(&plan()), "not a warm VM's plan");
        let changes: [fn(&mut Plan); 9] = [
            |plan| plan.options.vcpus = 2,
            |plan| plan.options.memory_mib = 257,
            |plan| plan.options.scratch_bytes += 1,
            |plan| plan.options.vmm = VmmKind::Krun,
            |plan| plan.options.installation.guest = "/y".into(),
            |plan| plan.options.debug_console = true,
            |plan| plan.options.host_network = true,
            |plan| plan.options.passt = true,
            |plan| plan.netns = Some("/netns/y".into()),
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut other = plan();
            change(&mut other);
            assert!(!other.fits(&warm), "change {index}");
        }
    }
}
