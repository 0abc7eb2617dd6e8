//! `info` of verbose statuses, with containerd's names, which crictl and scripts use.
//!
//! Values of environment variables are omitted: they may be secret, and crictl's output is often shared. Names are
//! included.

use super::container::ContainerMetadata;
use boxlite_proto::cri::v1::{
    ContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, NamespaceMode,
    PodSandboxConfig,
};
use boxlite_runtime::ContainerSnapshot;
use serde_json::{Value, json};

/// Placeholder for the value of a variable.
const WITHHELD: &str = "(withheld)";

/// Returns `info` of a ContainerStatus. `spec` is the OCI spec of the container; `pid` is the pid of its init process
/// in the guest.
pub(crate) fn container(
    snapshot: &ContainerSnapshot,
    spec: Option<Value>,
    pid: Option<u32>,
) -> Value {
    let record = ContainerMetadata::from_bytes(&snapshot.metadata);
    json!({
        "sandboxID": snapshot.box_id,
        "pid": pid.unwrap_or(0),
        "imageID": snapshot.image_id,
        "tty": snapshot.tty,
        "stdin": snapshot.stdin,
        "config": record.config.as_ref().map(container_config),
        "runtimeSpec": spec.map(without_values),
    })
}

/// Returns an OCI spec without the values of variables.
fn without_values(mut spec: Value) -> Value {
    let list = spec
        .pointer_mut("/process/env")
        .and_then(Value::as_array_mut);
    for entry in list.into_iter().flatten() {
        let text = entry.as_str().unwrap_or_default();
        let name = text.split_once('=').map_or(text, |(name, _)| name);
        *entry = json!(format!("{name}={WITHHELD}"));
    }
    spec
}

fn container_config(config: &ContainerConfig) -> Value {
    let metadata = config.metadata.clone().unwrap_or_default();
    let image = config.image.clone().unwrap_or_default();
    let mounts: Vec<_> = config
        .mounts
        .iter()
        .map(|mount| {
            json!({
                "container_path": mount.container_path,
                "host_path": mount.host_path,
                "readonly": mount.readonly,
                "propagation": mount.propagation,
            })
        })
        .collect();
    let linux = config.linux.as_ref();
    json!({
        "metadata": {"name": metadata.name, "attempt": metadata.attempt},
        "image": {"image": image.image, "user_specified_image": image.user_specified_image},
        "command": config.command,
        "args": config.args,
        "working_dir": config.working_dir,
        "mounts": mounts,
        "labels": config.labels,
        "annotations": config.annotations,
        "log_path": config.log_path,
        "stdin": config.stdin,
        "stdin_once": config.stdin_once,
        "tty": config.tty,
        "linux": {
            "resources": linux.and_then(|linux| linux.resources.as_ref()).map(resources),
            "security_context": linux.and_then(|linux| linux.security_context.as_ref()).map(security),
        },
    })
}

/// Returns the `config` of a pod.
pub(crate) fn sandbox_config(config: &PodSandboxConfig) -> Value {
    let metadata = config.metadata.clone().unwrap_or_default();
    let dns = config.dns_config.clone().unwrap_or_default();
    let ports: Vec<_> = config
        .port_mappings
        .iter()
        .map(|port| {
            json!({
                "protocol": port.protocol,
                "container_port": port.container_port,
                "host_port": port.host_port,
                "host_ip": port.host_ip,
            })
        })
        .collect();
    let linux = config.linux.clone().unwrap_or_default();
    json!({
        "metadata": {
            "name": metadata.name,
            "uid": metadata.uid,
            "namespace": metadata.namespace,
            "attempt": metadata.attempt,
        },
        "hostname": config.hostname,
        "log_directory": config.log_directory,
        "dns_config": {"servers": dns.servers, "searches": dns.searches, "options": dns.options},
        "port_mappings": ports,
        "labels": config.labels,
        "annotations": config.annotations,
        "linux": {
            "cgroup_parent": linux.cgroup_parent,
            "sysctls": linux.sysctls,
            "resources": linux.resources.as_ref().map(resources),
            "overhead": linux.overhead.as_ref().map(resources),
        },
    })
}

/// Returns the limits of a pod in the form of the CRI's ContainerResources; `None` without limits.
pub(crate) fn pod_resources(limits: Option<&LinuxContainerResources>) -> Option<Value> {
    limits.map(|limits| json!({"linux": resources(limits)}))
}

fn resources(limits: &LinuxContainerResources) -> Value {
    json!({
        "cpu_period": limits.cpu_period,
        "cpu_quota": limits.cpu_quota,
        "cpu_shares": limits.cpu_shares,
        "cpuset_cpus": limits.cpuset_cpus,
        "cpuset_mems": limits.cpuset_mems,
        "memory_limit_in_bytes": limits.memory_limit_in_bytes,
        "memory_swap_limit_in_bytes": limits.memory_swap_limit_in_bytes,
        "oom_score_adj": limits.oom_score_adj,
        "unified": limits.unified,
    })
}

fn security(security: &LinuxContainerSecurityContext) -> Value {
    let mode = |mode: i32| NamespaceMode::try_from(mode).map_or("", |mode| mode.as_str_name());
    let namespaces = security.namespace_options.clone().unwrap_or_default();
    let capabilities = security.capabilities.clone().unwrap_or_default();
    json!({
        "privileged": security.privileged,
        "readonly_rootfs": security.readonly_rootfs,
        "no_new_privs": security.no_new_privs,
        "run_as_user": security.run_as_user.map(|user| user.value),
        "run_as_group": security.run_as_group.map(|group| group.value),
        "run_as_username": security.run_as_username,
        "supplemental_groups": security.supplemental_groups,
        "capabilities": {
            "add_capabilities": capabilities.add_capabilities,
            "drop_capabilities": capabilities.drop_capabilities,
        },
        "namespace_options": {
            "network": mode(namespaces.network),
            "pid": mode(namespaces.pid),
            "ipc": mode(namespaces.ipc),
            "target_id": namespaces.target_id,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn environment_values_are_withheld() {
        let spec = json!({"process": {"env": ["A=secret", "B", "C=x=y"]}, "root": {}});
        let clean = without_values(spec);
        assert_eq!(
            clean["process"]["env"],
            json!(["A=(withheld)", "B=(withheld)", "C=(withheld)"])
        );
        assert_eq!(without_values(json!({})), json!({}));
    }
}
