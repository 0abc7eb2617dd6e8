//! Builds a pod's [`Plan`] from containerd's request: the OCI spec of a first task, or CRI's pod configuration.
//!
//! ```text
//! ctr run                    spec of the one container          limits of linux.resources
//! CRI plugin, pause task     spec of the pause container        io.kubernetes.cri.sandbox-* annotations
//! CRI plugin, sandboxer      PodConfig in CreateSandbox         linux.resources of the pod
//! ```
//!
//! Reads nothing but the probe's answer and the node's memory. The sandbox driver boots the plan.

use super::annotations::PodOverrides;
use super::config::ShimConfig;
use crate::error::{Result, ShimError};
use crate::sandbox::options::{Plan, SandboxOwner};
use boxlite_config::cgroup;
use boxlite_config::network::WithoutCni;
use boxlite_config::paths::DEFAULT_STATE_DIR;
use boxlite_config::size::{self, Limits, SizeRequest};
use boxlite_proto::names;
use boxlite_proto::shim::shim::PodConfig;
use boxlite_proto::vmm::{PodName, SandboxOptions, VmmKind, VmmUsers, VolumeWriters};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Annotation that distinguishes a pod's pause container (`sandbox`) from its others (`container`).
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Value of [`CONTAINER_TYPE`] on the pause container.
pub const TYPE_SANDBOX: &str = "sandbox";
/// Limits of the whole pod, set on the pause container by containerd's CRI plugin.
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// Names of the pod, set on each of its containers by containerd's CRI plugin.
const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
/// NamespaceMode NODE of the CRI.
const NODE: i32 = 2;
const MIB: u64 = 1 << 20;
/// Longest hostname that the kernel accepts, in bytes.
const MAX_HOSTNAME_BYTES: usize = 64;

/// A pod's requirements, independent of the message they came in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct PodRequest {
    pod: Option<PodName>,
    hostname: String,
    annotations: HashMap<String, String>,
    sysctls: BTreeMap<String, String>,
    limits: Limits,
    /// The pod's cgroup, in which the shim creates one for the VM.
    cgroup_parent: String,
}

/// Network of a first task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The namespace at this path, set up by CNI.
    Namespace(PathBuf),
    /// A new namespace without interfaces.
    Private,
    /// The host's namespace.
    Host,
}

/// Returns whether the spec is a pod's pause container.
pub fn is_pause(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations
        .and_then(|all| all.get(CONTAINER_TYPE))
        .is_some_and(|kind| kind == TYPE_SANDBOX)
}

/// Returns the network of a spec.
pub fn network(spec: &Spec) -> Network {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    let network = all
        .unwrap_or_default()
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    match network {
        Some(namespace) => match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => Network::Namespace(path.clone()),
            _ => Network::Private,
        },
        None => Network::Host,
    }
}

fn has(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let all = spec.linux().as_ref();
    let all = all.and_then(|linux| linux.namespaces().as_deref());
    let mut all = all.unwrap_or_default().iter();
    all.any(|namespace| namespace.typ() == kind)
}

/// Returns true if passt serves the network of a first task. It never serves a namespace that the spec names.
pub fn has_passt(spec: &Spec, config: &ShimConfig) -> bool {
    config.network.without_cni == WithoutCni::Passt && network(spec) == Network::Private
}

/// Returns the plan for a first task without a preceding CreateSandbox. Without `netns` the pod is in the host's network, or
/// has passt.
///
/// # Errors
/// Invalid, naming the field.
pub async fn of_task(
    id: &str,
    spec: &Spec,
    netns: Option<PathBuf>,
    config: &ShimConfig,
) -> Result<Plan> {
    let mut plan = plan(id, request_of_spec(spec), netns, SandboxOwner::Task, config).await?;
    plan.options.passt = plan.netns.is_none() && has_passt(spec, config);
    plan.options.host_network = plan.netns.is_none() && !plan.options.passt;
    // containerd's CRI plugin forwards ports; `ctr run` does not.
    plan.local_ports = is_pause(spec) && plan.netns.is_some();
    plan.host_ipc = !has(spec, LinuxNamespaceType::Ipc);
    Ok(plan)
}

/// Returns the plan for containerd's `sandboxer = "shim"`.
///
/// # Errors
/// As [`of_task`].
pub async fn of_pod(
    id: &str,
    pod: &PodConfig,
    netns: Option<PathBuf>,
    config: &ShimConfig,
) -> Result<Plan> {
    let namespaces = &pod.linux.security_context.namespace_options;
    let host_network = namespaces.network == NODE;
    if host_network && netns.is_some() {
        return Err(ShimError::Invalid {
            field: "netns_path",
            reason: "a pod in the host's network has no network namespace".to_owned(),
        });
    }
    let resources = &pod.linux.resources;
    let metadata = &pod.metadata;
    let request = PodRequest {
        pod: metadata.as_ref().map(|metadata| PodName {
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
        }),
        hostname: pod.hostname.clone(),
        annotations: pod.annotations.clone(),
        sysctls: pod.linux.sysctls.clone().into_iter().collect(),
        limits: Limits {
            memory_bytes: resources.memory_limit_in_bytes,
            cpu_quota_us: resources.cpu_quota,
            cpu_period_us: resources.cpu_period,
        },
        cgroup_parent: cgroup::expand_slice(&pod.linux.cgroup_parent),
    };
    let mut plan = plan(id, request, netns, SandboxOwner::Sandboxer, config).await?;
    plan.options.host_network = host_network;
    plan.options.passt =
        config.network.without_cni == WithoutCni::Passt && plan.netns.is_none() && !host_network;
    plan.local_ports = plan.netns.is_some();
    plan.host_ipc = namespaces.ipc == NODE;
    Ok(plan)
}

fn request_of_spec(spec: &Spec) -> PodRequest {
    let annotations = spec.annotations().clone().unwrap_or_default();
    let number = |name: &str| annotations.get(name).and_then(|text| text.parse().ok());
    let linux = spec.linux().clone().unwrap_or_default();
    let resources = linux.resources().clone().unwrap_or_default();
    let cpu = resources.cpu().clone().unwrap_or_default();
    // The pause container's own limits are not the pod's.
    let own = !is_pause(spec);
    let memory = resources
        .memory()
        .as_ref()
        .and_then(|memory| memory.limit());
    let cgroup = linux.cgroups_path().clone().unwrap_or_default();
    let period = cpu.period().and_then(|period| i64::try_from(period).ok());
    let text = |name: &str| annotations.get(name).cloned();
    PodRequest {
        pod: text(SANDBOX_NAME).map(|name| PodName {
            namespace: text(SANDBOX_NAMESPACE).unwrap_or_default(),
            name,
            uid: text(SANDBOX_UID).unwrap_or_default(),
        }),
        hostname: spec.hostname().clone().unwrap_or_default(),
        sysctls: linux
            .sysctl()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        limits: Limits {
            memory_bytes: number(SANDBOX_MEMORY)
                .or(memory.filter(|_| own))
                .unwrap_or(0),
            cpu_quota_us: number(SANDBOX_QUOTA)
                .or(cpu.quota().filter(|_| own))
                .unwrap_or(0),
            cpu_period_us: number(SANDBOX_PERIOD)
                .or(period.filter(|_| own))
                .unwrap_or(0),
        },
        cgroup_parent: cgroup::parent(&cgroup),
        annotations,
    }
}

async fn plan(
    id: &str,
    request: PodRequest,
    netns: Option<PathBuf>,
    owner: SandboxOwner,
    config: &ShimConfig,
) -> Result<Plan> {
    let overrides = PodOverrides::read(&request.annotations, &config.allowed_annotations)?;
    let (vmm, acceleration) = config.choose(overrides.vmm).await?;
    let acceleration = match vmm {
        VmmKind::Krun => boxlite_proto::vmm::Acceleration::Kvm,
        VmmKind::Qemu => acceleration,
    };
    let defaults = config.pod.for_node(acceleration);
    let size = SizeRequest {
        limits: request.limits,
        vcpus: overrides.vcpus,
        memory_mib: overrides.memory_mib,
        node_mib: size::node_mib(),
    };
    let size = size::vm_size(&size, &defaults).map_err(|error| ShimError::Invalid {
        field: "memory limit",
        reason: error.to_string(),
    })?;
    let mut installation = config.installation();
    if let Some(kernel) = overrides.kernel {
        installation.libkrunfw = kernel;
    }
    let options = SandboxOptions {
        pod: request.pod,
        vcpus: size.vcpus,
        memory_mib: size.memory_mib,
        containers_bytes: size.containers_bytes,
        scratch_bytes: u64::from(config.pod.scratch_mib) * MIB,
        scratch_dir: None,
        acceleration,
        vmm,
        hostname: hostname(&request.hostname, id),
        host_network: false,
        passt: false,
        sysctls: request.sysctls,
        installation,
        cgroup_parent: request.cgroup_parent,
        debug_console: overrides.debug_console.unwrap_or(config.pod.debug_console),
        volume_writers: Some(VolumeWriters {
            registry: Path::new(DEFAULT_STATE_DIR).join(names::VOLUME_WRITERS),
            policy: config.pod.shared_volume_writers,
        }),
        vmm_users: config.pod.vmm_ids.map(|ids| VmmUsers {
            registry: Path::new(DEFAULT_STATE_DIR).join(names::VMM_USERS),
            ids,
        }),
        warm: false,
    };
    Ok(Plan {
        options,
        netns,
        owner,
        local_ports: false,
        host_ipc: false,
    })
}

/// Returns the requested hostname, else the first 12 characters of the id, as runc's containers have it under containerd.
fn hostname(requested: &str, id: &str) -> String {
    let name = if requested.is_empty() {
        id.get(..12).unwrap_or(id)
    } else {
        requested
    };
    name.chars().take(MAX_HOSTNAME_BYTES).collect()
}

#[cfg(test)]
mod tests;
