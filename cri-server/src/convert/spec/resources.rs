//! `linux.resources` of a container, converted from the CRI's.

use super::ConvertError;
use boxlite_proto::cri::v1::LinuxContainerResources;
use serde_json::{Map, Value, json};

/// Value of a quota or limit that is unlimited.
const UNLIMITED: i64 = -1;
/// Minimum CPU time of a period that the kernel accepts as quota, in µs.
const MIN_CPU_TIME_US: i64 = 1000;

/// Returns the resources without cpusets. CRI's cpusets have the host's CPU and memory node numbers, which do not exist in a
/// VM: it has separate vCPUs, and their number bounds the pod.
pub(crate) fn without_host_cpusets(resources: &LinuxContainerResources) -> LinuxContainerResources {
    LinuxContainerResources {
        cpuset_cpus: String::new(),
        cpuset_mems: String::new(),
        ..resources.clone()
    }
}

/// Returns the object, empty without limits. Hugepage limits are ignored: the guest has no reserved hugepages.
pub(crate) fn resources(limits: Option<&LinuxContainerResources>) -> Result<Value, ConvertError> {
    let Some(limits) = limits else {
        return Ok(json!({}));
    };
    let mut cpu = Map::new();
    for (key, value) in [
        ("shares", limits.cpu_shares),
        ("quota", limits.cpu_quota),
        ("period", limits.cpu_period),
    ] {
        if value != 0 {
            let reason = match (key, value) {
                ("quota", UNLIMITED) => None,
                ("quota", MIN_CPU_TIME_US..) => None,
                ("quota", _) => Some(format!("must be -1 or at least {MIN_CPU_TIME_US}")),
                (_, ..0) => Some("must not be negative".to_owned()),
                _ => None,
            };
            if let Some(reason) = reason {
                let value = format!("{key} {value}");
                return Err(ConvertError::invalid("linux.resources.cpu", value, reason));
            }
            cpu.insert(key.into(), json!(value));
        }
    }
    for (key, value) in [("cpus", &limits.cpuset_cpus), ("mems", &limits.cpuset_mems)] {
        if !value.is_empty() {
            cpu.insert(key.into(), json!(value));
        }
    }
    let mut memory = Map::new();
    for (key, value) in [
        ("limit", limits.memory_limit_in_bytes),
        ("swap", limits.memory_swap_limit_in_bytes),
    ] {
        if value != 0 {
            if value < UNLIMITED {
                let value = format!("{key} {value}");
                return Err(ConvertError::invalid(
                    "linux.resources.memory",
                    value,
                    "must not be negative, except for -1",
                ));
            }
            memory.insert(key.into(), json!(value));
        }
    }
    if !limits.hugepage_limits.is_empty() {
        tracing::debug!("ignoring hugepage limits: the guest has no reserved hugepages");
    }
    let mut resources = json!({});
    if !cpu.is_empty() {
        resources["cpu"] = Value::Object(cpu);
    }
    if !memory.is_empty() {
        resources["memory"] = Value::Object(memory);
    }
    if !limits.unified.is_empty() {
        for key in limits.unified.keys() {
            let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_');
            if !key.contains('.') || !key.chars().all(name) {
                return Err(ConvertError::invalid(
                    "linux.resources.unified",
                    key.clone(),
                    "not a cgroup v2 file",
                ));
            }
        }
        resources["unified"] = json!(limits.unified);
    }
    Ok(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_limits_and_small_quotas_are_refused_by_field() {
        for (cpu_quota, memory_limit_in_bytes, field) in [
            (10, 0, "quota 10"),
            (-5, 0, "quota -5"),
            (0, -5, "limit -5"),
        ] {
            let limits = LinuxContainerResources {
                cpu_quota,
                memory_limit_in_bytes,
                ..Default::default()
            };
            let text = resources(Some(&limits)).unwrap_err().to_string();
            assert!(text.contains(field), "{text}");
        }
        let unlimited = LinuxContainerResources {
            cpu_quota: -1,
            memory_limit_in_bytes: -1,
            ..Default::default()
        };
        assert!(resources(Some(&unlimited)).is_ok());
    }
}
