//! A pod's [`Plan`] out of what containerd says: the OCI spec of a first task, or CRI's pod configuration.
//!
//! ```text
//! ctr run                    spec of the one container          limits of linux.resources
//! CRI plugin, pause task     spec of the pause container        io.kubernetes.cri.sandbox-* annotations
//! CRI plugin, sandboxer      PodConfig in CreateSandbox         linux.resources of the pod
//! ```
//!
//! Pure but for the probe and the check of the pod's cgroup. Booting is the sandbox driver's.

use super::annotations::Wishes;
use super::config::ShimConfig;
use crate::error::{Result, ShimError};
use crate::sandbox::options::{Plan, SandboxOwner};
use boxlite_proto::shim::shim::PodConfig;
use boxlite_proto::vmm::{SandboxOptions, VmmKind};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};

/// Annotation that tells a pod's pause container (`sandbox`) from its others (`container`).
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The pause container.
pub const TYPE_SANDBOX: &str = "sandbox";
/// Limits of the whole pod, as containerd's CRI plugin writes them down on the pause container.
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// CRI's NamespaceMode NODE.
const NODE: i32 = 2;
const MIB: u64 = 1 << 20;
/// Default period of the CPU quota in µs.
const PERIOD: i64 = 100_000;
/// Most vCPUs a pod gets.
const VCPU_LIMIT: i64 = 64;
/// cgroup v1 writes "no limit" as a number; everything from an exbibyte up is none.
const NO_LIMIT: u64 = 1 << 60;
/// Longest host name the kernel takes, in bytes.
const HOSTNAME_LIMIT: usize = 64;

/// What a pod's VM must hold, whoever said it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Needs {
    hostname: String,
    annotations: HashMap<String, String>,
    sysctls: BTreeMap<String, String>,
    /// Bytes; 0: no limit.
    memory: i64,
    /// Bytes of the RuntimeClass's overhead; 0: the configured one.
    overhead: i64,
    quota: i64,
    period: i64,
    /// Parent for the pod's own cgroup.
    cgroup_parent: String,
}

/// Which network a first task wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// The namespace at this path, as CNI left it.
    Namespace(PathBuf),
    /// One of its own with nothing in it.
    Private,
    /// The host's: the VMM's own.
    Host,
}

/// Whether the spec is a pod's pause container.
pub fn is_pause(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations
        .and_then(|all| all.get(CONTAINER_TYPE))
        .is_some_and(|kind| kind == TYPE_SANDBOX)
}

/// The network that a spec asks for.
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

/// The plan for a first task that no CreateSandbox came before. Without `netns` the pod is in the host's network.
///
/// # Errors
/// Invalid, naming what cannot be followed.
pub async fn of_task(
    id: &str,
    spec: &Spec,
    netns: Option<PathBuf>,
    config: &ShimConfig,
) -> Result<Plan> {
    let mut plan = plan(id, needs_of_spec(spec), netns, SandboxOwner::Task, config).await?;
    plan.options.host_network = plan.netns.is_none();
    // `ctr run` has no port-forward; containerd's CRI plugin has.
    plan.local_ports = is_pause(spec) && plan.netns.is_some();
    plan.host_ipc = !has(spec, LinuxNamespaceType::Ipc);
    Ok(plan)
}

/// The plan for containerd's `sandboxer = "shim"`.
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
            reason: "a pod in the host's network has no namespace of its own".to_owned(),
        });
    }
    let resources = &pod.linux.resources;
    let needs = Needs {
        hostname: pod.hostname.clone(),
        annotations: pod.annotations.clone(),
        sysctls: pod.linux.sysctls.clone().into_iter().collect(),
        memory: resources.memory_limit_in_bytes,
        overhead: pod.linux.overhead.memory_limit_in_bytes,
        quota: resources.cpu_quota,
        period: resources.cpu_period,
        cgroup_parent: expand_slice(&pod.linux.cgroup_parent),
    };
    let mut plan = plan(id, needs, netns, SandboxOwner::Sandboxer, config).await?;
    plan.options.host_network = host_network;
    plan.local_ports = plan.netns.is_some();
    plan.host_ipc = namespaces.ipc == NODE;
    Ok(plan)
}

fn needs_of_spec(spec: &Spec) -> Needs {
    let annotations = spec.annotations().clone().unwrap_or_default();
    let number = |name: &str| annotations.get(name).and_then(|text| text.parse().ok());
    let linux = spec.linux().clone().unwrap_or_default();
    let resources = linux.resources().clone().unwrap_or_default();
    let cpu = resources.cpu().clone().unwrap_or_default();
    let own = !is_pause(spec);
    let memory = resources
        .memory()
        .as_ref()
        .and_then(|memory| memory.limit());
    let cgroup = linux.cgroups_path().clone().unwrap_or_default();
    let period = cpu.period().and_then(|period| i64::try_from(period).ok());
    Needs {
        hostname: spec.hostname().clone().unwrap_or_default(),
        sysctls: linux
            .sysctl()
            .clone()
            .unwrap_or_default()
            .into_iter()
            .collect(),
        memory: number(SANDBOX_MEMORY)
            .or(memory.filter(|_| own))
            .unwrap_or(0),
        overhead: 0,
        quota: number(SANDBOX_QUOTA)
            .or(cpu.quota().filter(|_| own))
            .unwrap_or(0),
        period: number(SANDBOX_PERIOD)
            .or(period.filter(|_| own))
            .unwrap_or(0),
        cgroup_parent: parent_of(&cgroup),
        annotations,
    }
}

async fn plan(
    id: &str,
    needs: Needs,
    netns: Option<PathBuf>,
    owner: SandboxOwner,
    config: &ShimConfig,
) -> Result<Plan> {
    let wishes = Wishes::read(&needs.annotations, &config.allowed_annotations)?;
    let (vmm, acceleration) = config.choose(wishes.vmm).await?;
    let overhead = mib(needs.overhead)
        .unwrap_or(0)
        .max(u64::from(config.pod.overhead_mib));
    let containers = wishes.memory_mib.map(u64::from).or(mib(needs.memory));
    let containers = containers.unwrap_or(u64::from(config.pod.memory_mib));
    check_cgroup(&needs.cgroup_parent, containers, overhead)?;
    let memory_mib =
        u32::try_from(containers.saturating_add(overhead)).map_err(|_| ShimError::Invalid {
            field: "memory limit",
            reason: format!("{containers} MiB are more than a VM can have"),
        })?;
    let mut installation = config.installation();
    if let Some(kernel) = wishes.kernel {
        installation.libkrunfw = kernel;
    }
    let options = SandboxOptions {
        vcpus: wishes.vcpus.or(vcpus(&needs)).unwrap_or(config.pod.vcpus),
        memory_mib,
        scratch_bytes: u64::from(config.pod.scratch_mib) * MIB,
        scratch_dir: None,
        acceleration: match vmm {
            VmmKind::Krun => boxlite_proto::vmm::Acceleration::Kvm,
            VmmKind::Qemu => acceleration,
        },
        vmm,
        hostname: hostname(&needs.hostname, id),
        host_network: false,
        sysctls: needs.sysctls,
        installation,
        cgroup_parent: needs.cgroup_parent,
        debug_console: wishes.debug_console.unwrap_or(config.pod.debug_console),
    };
    Ok(Plan {
        options,
        netns,
        owner,
        local_ports: false,
        host_ipc: false,
    })
}

/// As runc's containers have it under containerd: what was asked for, else the id's beginning.
fn hostname(wanted: &str, id: &str) -> String {
    let name = if wanted.is_empty() {
        id.get(..12).unwrap_or(id)
    } else {
        wanted
    };
    name.chars().take(HOSTNAME_LIMIT).collect()
}

fn mib(bytes: i64) -> Option<u64> {
    u64::try_from(bytes)
        .ok()
        .filter(|bytes| *bytes > 0 && *bytes < NO_LIMIT)
        .map(|bytes| bytes.div_ceil(MIB))
}

/// The CPU limit rounded up; `None` for no limit.
fn vcpus(needs: &Needs) -> Option<u8> {
    if needs.quota <= 0 {
        return None;
    }
    let period = if needs.period > 0 {
        needs.period
    } else {
        PERIOD
    };
    let count = needs.quota / period + i64::from(needs.quota % period > 0);
    u8::try_from(count.clamp(1, VCPU_LIMIT)).ok()
}

/// The cgroup above the one that a spec names: cgroupfs's `/kubepods/podX/<id>`, systemd's `podX.slice:cri-containerd:<id>`.
fn parent_of(cgroup: &Path) -> String {
    let text = cgroup.to_string_lossy();
    if let Some((slice, _)) = text.split_once(".slice:") {
        return expand_slice(&format!("{slice}.slice"));
    }
    let plain = cgroup.is_absolute()
        && cgroup
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    match cgroup.parent() {
        Some(parent) if plain && parent != Path::new("/") => parent.display().to_string(),
        _ => String::new(),
    }
}

/// systemd's `a-b-c.slice` is the directory `a.slice/a-b.slice/a-b-c.slice`; anything else stays as it is.
fn expand_slice(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or_default();
    let Some(stem) = last
        .strip_suffix(".slice")
        .filter(|_| !name.trim_start_matches('/').contains('/'))
    else {
        return name.to_owned();
    };
    let ends = stem
        .match_indices('-')
        .map(|(at, _)| at)
        .chain([stem.len()]);
    ends.map(|end| format!("/{}.slice", &stem[..end])).collect()
}

/// Refuses a VM that the kernel would kill: its memory must fit the pod's cgroup, where that has a limit.
fn check_cgroup(parent: &str, containers: u64, overhead: u64) -> Result<()> {
    let relative = parent.trim_start_matches('/');
    if relative.is_empty() || relative.split('/').any(|part| part == "..") {
        return Ok(());
    }
    let mount = Path::new("/sys/fs/cgroup");
    let text = std::fs::read_to_string(mount.join(relative).join("memory.max")).or_else(|_| {
        std::fs::read_to_string(
            mount
                .join("memory")
                .join(relative)
                .join("memory.limit_in_bytes"),
        )
    });
    let limit = text.ok().and_then(|text| text.trim().parse::<u64>().ok());
    let Some(limit) = limit.filter(|limit| *limit < NO_LIMIT) else {
        return Ok(());
    };
    let vm = containers + overhead;
    if limit >= vm.saturating_mul(MIB) {
        return Ok(());
    }
    Err(ShimError::Invalid {
        field: "memory limit",
        reason: format!(
            "the pod's VM needs {vm} MiB ({containers} MiB for containers + {overhead} MiB overhead) and the pod cgroup \
             {parent} allows {} MiB: give the RuntimeClass an overhead of at least {overhead} MiB",
            limit / MIB
        ),
    })
}

#[cfg(test)]
mod tests;
