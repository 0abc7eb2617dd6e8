//! The cgroup tree of the VM ([`create_tree`]) and the limits of the pod as a whole ([`update_pod`]).

use super::error::CgroupError;
use super::{Cgroup, resources};
use crate::system::memory_total;
use std::fs;

/// Name of the agent's cgroup.
const AGENT: &str = "agent";
/// Memory unavailable to containers, in bytes: for the agent, its buffers and the kernel (measured: the agent idles
/// below 6 MiB; a container costs it at maximum its 1 MiB output buffer).
const MEMORY_RESERVE_BYTES: u64 = 16 << 20;
/// Processes unavailable to containers: for the agent, the spawner, its helpers and kernel threads.
const PROCESS_RESERVE: u64 = 256;
/// Controllers enabled for containers if the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb"];

/// Creates the tree at boot and moves the agent into its cgroup.
///
/// # Errors
/// If the tree cannot be created. A missing controller is not an error; its limits fail when they are set.
pub(crate) fn create_tree() -> Result<(), CgroupError> {
    let root = Cgroup::root();
    let agent = root.child(AGENT);
    agent.create()?;
    agent.write("cgroup.procs", "0")?;
    enable_controllers(&root);
    let pod = Cgroup::pod();
    pod.create()?;
    enable_controllers(&pod);
    limit_pod(&pod);
    Ok(())
}

/// Enables controllers one at a time: a single unknown name would make the kernel reject all of them.
fn enable_controllers(cgroup: &Cgroup) {
    for controller in CONTROLLERS {
        let _ = cgroup.write("cgroup.subtree_control", &format!("+{controller}"));
    }
}

/// Reserves memory and processes for the agent.
fn limit_pod(pod: &Cgroup) {
    if let Some(limit) = pod_memory_limit() {
        let _ = pod.write("memory.max", &limit.to_string());
    }
    if let Some(limit) = pod_process_limit() {
        let _ = pod.write("pids.max", &limit.to_string());
    }
}

/// Returns the maximum number of processes of all containers together.
fn pod_process_limit() -> Option<u64> {
    let threads = fs::read_to_string("/proc/sys/kernel/threads-max");
    let pids = fs::read_to_string("/proc/sys/kernel/pid_max");
    let limit = [threads, pids]
        .into_iter()
        .flatten()
        .filter_map(|text| text.trim().parse::<u64>().ok())
        .min()?;
    Some(limit.saturating_sub(PROCESS_RESERVE).max(limit / 2))
}

/// Limits the number of processes of all containers together; 0 keeps the limit of the VM.
///
/// # Errors
/// If the kernel has the controller and rejects the limit.
pub(crate) fn limit_processes(limit: u64) -> Result<(), CgroupError> {
    let pod = Cgroup::pod();
    if limit == 0 || !pod.path().join("pids.max").exists() {
        return Ok(());
    }
    pod.write(
        "pids.max",
        &bounded(&limit.to_string(), pod_process_limit()),
    )
}

/// Returns the maximum memory of all containers together, in bytes.
fn pod_memory_limit() -> Option<u64> {
    memory_total().map(|total| total.saturating_sub(MEMORY_RESERVE_BYTES).max(total / 2))
}

/// Limits the memory of all containers together, in bytes, as far as the agent's reserve allows; 0 keeps the present limit.
/// Best effort, as at boot: a kernel without the controller has no limits.
pub(crate) fn limit_memory(limit: u64) {
    if limit > 0 {
        let value = bounded(&limit.to_string(), pod_memory_limit());
        let _ = Cgroup::pod().write("memory.max", &value);
    }
}

/// Applies new limits to the pod's cgroup. A memory limit is capped at the memory that the agent can spare.
///
/// # Errors
/// As [`resources::apply`].
pub(crate) fn update_pod(limits: &oci_spec::runtime::LinuxResources) -> Result<(), CgroupError> {
    for (file, value) in resources::settings(limits)? {
        let value = match file.as_str() {
            "memory.max" => bounded(&value, pod_memory_limit()),
            "pids.max" => bounded(&value, pod_process_limit()),
            _ => value,
        };
        Cgroup::pod().write(&file, &value)?;
    }
    Ok(())
}

fn bounded(requested: &str, maximum: Option<u64>) -> String {
    match (requested.parse::<u64>(), maximum) {
        (Ok(requested), Some(maximum)) => requested.min(maximum).to_string(),
        (Err(_), Some(maximum)) => maximum.to_string(),
        (_, None) => requested.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::bounded;

    #[test]
    fn bounded_caps_at_the_maximum() {
        assert_eq!(bounded("100", Some(70)), "70");
        assert_eq!(bounded("50", Some(70)), "50");
        assert_eq!(bounded("max", Some(70)), "70");
        assert_eq!(bounded("max", None), "max");
    }
}
