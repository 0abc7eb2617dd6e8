//! Adapts the OCI spec of a request to this VM: [`adapt`].
//!
//! Namespaces, cgroups, limits and hooks of the spec refer to the host. In the VM a container has its own mount, PID
//! and cgroup namespace and shares the VM's network, IPC and UTS namespaces. The agent sets its limits; the spawner
//! applies capabilities, no_new_privs and seccomp. Hooks, AppArmor and SELinux are dropped because their targets do
//! not exist in the VM. Everything else is passed to libcontainer unchanged.

use super::error::ContainerError;
use crate::seccomp::Filter;
use crate::spawner::ResolvedUser;
use crate::spawner::wire::{Confinement, ProcessPlan, UserPlan};
use boxlite_proto::names::GROUPS_ANNOTATION;
use oci_spec::runtime::{
    Box as ConsoleSize, Linux, LinuxCapabilities, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResources, LinuxSeccomp, Mount, PosixRlimit, Process, Root, Spec,
    User,
};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The only value of the annotation about supplemental groups.
const GROUPS_MERGE: &str = "merge";
/// Maximum size of arguments and environment together, in bytes; the kernel's own limit is about 2 MiB.
const MAX_ARGUMENT_BYTES: usize = 2 << 20;
/// Maximum number of mounts of a container.
const MAX_MOUNTS: usize = 512;

/// PID namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PidNamespace {
    Own,
    Joined(PathBuf),
    /// The VM's own, shared with the agent.
    Vm,
}

/// Properties of a container that its spec does not contain.
#[derive(Debug)]
pub(crate) struct ContainerFacts<'a> {
    /// Root of the mounted tree.
    pub rootfs: &'a Path,
    pub read_only: bool,
    /// Path below the cgroup mount.
    pub cgroup: String,
    pub pid_namespace: PidNamespace,
    /// User namespace to join; `None` for the VM's.
    pub user_namespace: Option<PathBuf>,
    pub terminal: bool,
    pub user: &'a ResolvedUser,
    /// True if the kernel supports POSIX message queues.
    pub mqueue: bool,
}

/// Parts of a spec that the agent handles itself.
#[derive(Debug, Default)]
pub(crate) struct Extracted {
    pub resources: Option<LinuxResources>,
    pub sysctls: HashMap<String, String>,
    pub confinement: Confinement,
}

/// Parses and validates the spec of a request.
pub(crate) fn parse(json: &[u8]) -> Result<Spec, ContainerError> {
    let invalid = |reason: String| ContainerError::Invalid {
        field: "spec_json",
        reason,
    };
    let spec: Spec = serde_json::from_slice(json).map_err(|error| invalid(error.to_string()))?;
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| invalid("process is missing".to_owned()))?;
    check_process(
        process.args().as_deref(),
        process.env().as_deref(),
        process.cwd(),
    )?;
    if spec
        .mounts()
        .as_ref()
        .is_some_and(|mounts| mounts.len() > MAX_MOUNTS)
    {
        return Err(invalid(format!("more than {MAX_MOUNTS} mounts")));
    }
    Ok(spec)
}

fn check_process(
    args: Option<&[String]>,
    env: Option<&[String]>,
    cwd: &Path,
) -> Result<(), ContainerError> {
    let invalid = |field, reason: &str| ContainerError::Invalid {
        field,
        reason: reason.to_owned(),
    };
    let args = args.unwrap_or_default();
    if args.is_empty() {
        return Err(invalid("process.args", "no command specified"));
    }
    let strings = args.iter().chain(env.unwrap_or_default());
    if strings.clone().any(|text| text.contains('\0')) {
        return Err(invalid(
            "process",
            "an argument or environment variable contains a NUL byte",
        ));
    }
    if strings.map(String::len).sum::<usize>() > MAX_ARGUMENT_BYTES {
        return Err(invalid("process", "arguments and environment are too long"));
    }
    if !cwd.is_absolute() {
        return Err(invalid("process.cwd", "not an absolute path"));
    }
    Ok(())
}

/// Returns the user of the container's process as the spec defines it.
pub(crate) fn user_plan(spec: &Spec) -> UserPlan {
    let merge = spec
        .annotations()
        .as_ref()
        .and_then(|annotations| annotations.get(GROUPS_ANNOTATION))
        .is_some_and(|value| value == GROUPS_MERGE);
    let user = spec
        .process()
        .as_ref()
        .map(Process::user)
        .cloned()
        .unwrap_or_default();
    plan_of(&user, merge)
}

fn plan_of(user: &User, merge_groups: bool) -> UserPlan {
    UserPlan {
        uid: user.uid(),
        gid: user.gid(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask(),
        name: user.username().clone().filter(|name| !name.is_empty()),
        merge_groups,
    }
}

/// Adapts the spec to this VM and extracts the parts handled by the agent.
pub(crate) fn adapt(
    spec: &mut Spec,
    facts: &ContainerFacts<'_>,
) -> Result<Extracted, ContainerError> {
    let mut extracted = Extracted::default();
    let mut root = Root::default();
    root.set_path(facts.rootfs.to_path_buf())
        .set_readonly(Some(facts.read_only));
    spec.set_root(Some(root))
        .set_hooks(None)
        .set_hostname(None)
        .set_domainname(None);
    let mut linux = spec.linux().clone().unwrap_or_default();
    extracted.resources = linux.resources().clone();
    extracted.sysctls = linux.sysctl().clone().unwrap_or_default();
    extracted.confinement = confinement(spec.process().as_ref(), linux.seccomp().as_ref())?;
    adapt_linux(&mut linux, facts)?;
    let devices = super::devices::of(spec, facts.user_namespace.is_some())?;
    if !devices.is_empty() {
        // In addition to devices listed by number in the spec, such as those added by an NRI plugin.
        let mut all = linux.devices().clone().unwrap_or_default();
        all.retain(|named| devices.iter().all(|device| device.path() != named.path()));
        all.extend(devices);
        linux.set_devices(Some(all));
    }
    spec.set_linux(Some(linux));
    if let Some(mounts) = spec.mounts().clone() {
        spec.set_mounts(Some(adapt_mounts(mounts, facts)));
    }
    if let Some(mut process) = spec.process().clone() {
        adapt_process(&mut process, facts);
        spec.set_process(Some(process));
    }
    Ok(extracted)
}

/// Extracts the privileges of the program. The spawner applies them, so they are removed from the spec.
fn confinement(
    process: Option<&Process>,
    seccomp: Option<&LinuxSeccomp>,
) -> Result<Confinement, ContainerError> {
    let seccomp = seccomp.map(Filter::compile).transpose();
    Ok(Confinement {
        capabilities: process.and_then(|process| process.capabilities().clone()),
        no_new_privileges: process
            .and_then(Process::no_new_privileges)
            .unwrap_or(false),
        seccomp: seccomp.map_err(|error| ContainerError::Invalid {
            field: "linux.seccomp",
            reason: error.to_string(),
        })?,
    })
}

fn adapt_linux(linux: &mut Linux, facts: &ContainerFacts<'_>) -> Result<(), ContainerError> {
    let mut namespaces = vec![
        namespace(LinuxNamespaceType::Mount, None)?,
        namespace(LinuxNamespaceType::Cgroup, None)?,
    ];
    match &facts.pid_namespace {
        PidNamespace::Own => namespaces.push(namespace(LinuxNamespaceType::Pid, None)?),
        PidNamespace::Joined(path) => {
            namespaces.push(namespace(LinuxNamespaceType::Pid, Some(path.clone()))?);
        }
        PidNamespace::Vm => {}
    }
    if let Some(path) = &facts.user_namespace {
        namespaces.push(namespace(LinuxNamespaceType::User, Some(path.clone()))?);
    }
    linux
        .set_namespaces(Some(namespaces))
        .set_cgroups_path(Some(PathBuf::from(&facts.cgroup)))
        .set_resources(None)
        .set_sysctl(None)
        .set_seccomp(None)
        .set_mount_label(None)
        .set_intel_rdt(None)
        .set_net_devices(None)
        .set_memory_policy(None)
        .set_time_offsets(None)
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    Ok(())
}

fn namespace(
    typ: LinuxNamespaceType,
    path: Option<PathBuf>,
) -> Result<LinuxNamespace, ContainerError> {
    let mut builder = LinuxNamespaceBuilder::default().typ(typ);
    if let Some(path) = path {
        builder = builder.path(path);
    }
    builder.build().map_err(|error| ContainerError::Invalid {
        field: "namespace",
        reason: error.to_string(),
    })
}

/// Replaces mounts of shared memory and message queues by binds of the VM's. In a user namespace the same applies to
/// sysfs and message queues, which show the VM's network and IPC namespaces: the container does not own these and
/// cannot mount them.
fn adapt_mounts(mounts: Vec<Mount>, facts: &ContainerFacts<'_>) -> Vec<Mount> {
    let mapped = facts.user_namespace.is_some();
    let mut adapted = Vec::with_capacity(mounts.len());
    for mut mount in mounts {
        match (mount.typ().as_deref(), mount.destination().to_str()) {
            (Some("tmpfs" | "shm"), Some("/dev/shm")) => {
                let options = ["rbind", "rw", "nosuid", "nodev", "noexec"].map(str::to_owned);
                mount
                    .set_typ(Some("bind".to_owned()))
                    .set_source(Some(PathBuf::from("/dev/shm")))
                    .set_options(Some(options.to_vec()));
            }
            (Some("mqueue"), _) if !facts.mqueue => continue,
            (Some(kind @ ("sysfs" | "mqueue")), _) if mapped => {
                let source = if kind == "sysfs" {
                    "/sys"
                } else {
                    "/dev/mqueue"
                };
                let mut options = mount.options().clone().unwrap_or_default();
                options.insert(0, "rbind".to_owned());
                mount
                    .set_typ(Some("bind".to_owned()))
                    .set_source(Some(PathBuf::from(source)))
                    .set_options(Some(options));
            }
            _ => {}
        }
        adapted.push(mount);
    }
    adapted
}

fn adapt_process(process: &mut Process, facts: &ContainerFacts<'_>) {
    let mut user = process.user().clone();
    user.set_uid(facts.user.uid).set_gid(facts.user.gid);
    user.set_additional_gids(Some(facts.user.additional_gids.clone()))
        .set_username(None);
    let mut env = process.env().clone().unwrap_or_default();
    // libcontainer would call the C library, which in a static build requires the container's libraries.
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", facts.user.home));
    }
    process
        .set_user(user)
        .set_env(Some(env))
        .set_terminal(Some(facts.terminal))
        .set_capabilities(None)
        .set_no_new_privileges(None)
        .set_apparmor_profile(None)
        .set_selinux_label(None);
}

/// Returns the plan of the container's own process, from an adapted spec; execs inherit fields from it.
pub(crate) fn process_plan(spec: &Spec, confinement: &Confinement) -> Option<ProcessPlan> {
    let process = spec.process().as_ref()?;
    Some(ProcessPlan {
        terminal: process.terminal().unwrap_or(false),
        console_size: size_of(process.console_size().as_ref()),
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().clone(),
        user: plan_of(process.user(), false),
        confinement: confinement.clone(),
        rlimits: process.rlimits().clone().unwrap_or_default(),
        oom_score_adj: process.oom_score_adj().unwrap_or(0),
    })
}

/// Returns rows and columns.
fn size_of(size: Option<&ConsoleSize>) -> (u16, u16) {
    let cells = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
    size.map_or((0, 0), |size| (cells(size.height()), cells(size.width())))
}

/// An OCI process with all fields optional.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PartialProcess {
    args: Option<Vec<String>>,
    env: Option<Vec<String>>,
    cwd: Option<PathBuf>,
    user: Option<User>,
    capabilities: Option<LinuxCapabilities>,
    no_new_privileges: Option<bool>,
    rlimits: Option<Vec<PosixRlimit>>,
    oom_score_adj: Option<i32>,
    console_size: Option<ConsoleSize>,
}

/// Returns the plan of an exec: fields of `json`, completed from the container's own process.
pub(crate) fn exec_plan(
    json: &[u8],
    terminal: bool,
    base: &ProcessPlan,
) -> Result<ProcessPlan, ContainerError> {
    let partial: PartialProcess =
        serde_json::from_slice(json).map_err(|error| ContainerError::Invalid {
            field: "process_json",
            reason: error.to_string(),
        })?;
    let mut plan = base.clone();
    plan.terminal = terminal;
    plan.args = partial.args.unwrap_or_default();
    plan.env = partial.env.unwrap_or(plan.env);
    plan.cwd = partial
        .cwd
        .filter(|cwd| !cwd.as_os_str().is_empty())
        .unwrap_or(plan.cwd);
    if let Some(user) = &partial.user {
        plan.user = plan_of(user, false);
        // The home directory in the base's environment belongs to another user.
        if plan.user != base.user {
            plan.env.retain(|entry| {
                !entry.starts_with("HOME=") || base.env.iter().all(|own| own != entry)
            });
        }
    }
    let confinement = &mut plan.confinement;
    if partial.capabilities.is_some() {
        confinement.capabilities = partial.capabilities;
    }
    confinement.no_new_privileges = partial
        .no_new_privileges
        .unwrap_or(confinement.no_new_privileges);
    plan.rlimits = partial.rlimits.unwrap_or(plan.rlimits);
    plan.oom_score_adj = partial.oom_score_adj.unwrap_or(plan.oom_score_adj);
    plan.console_size = size_of(partial.console_size.as_ref());
    if terminal && !plan.env.iter().any(|entry| entry.starts_with("TERM=")) {
        plan.env.push("TERM=xterm".to_owned());
    }
    check_process(Some(&plan.args), Some(&plan.env), &plan.cwd)?;
    Ok(plan)
}

/// Returns the plan of a container whose spec has no process, which [`parse`] rejects.
pub(crate) fn empty_plan() -> ProcessPlan {
    ProcessPlan {
        terminal: false,
        console_size: (0, 0),
        args: Vec::new(),
        env: Vec::new(),
        cwd: PathBuf::from("/"),
        user: UserPlan::default(),
        confinement: Confinement {
            no_new_privileges: true,
            ..Confinement::default()
        },
        rlimits: Vec::new(),
        oom_score_adj: 0,
    }
}

#[cfg(test)]
mod tests;
