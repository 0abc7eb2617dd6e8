//! Resources of containers as UpdateContainerResources last set them, for ContainerStatus.
//!
//! The runtime keeps a container's record as it was created, so these live as long as this daemon does: after a restart the status shows
//! the created values again, while the guest's cgroup keeps the new ones. The kubelet then updates once more.

use super::lock;
use boxlite_proto::cri::v1::LinuxContainerResources;
use std::collections::HashMap;
use std::sync::Mutex;

/// By container id.
#[derive(Debug, Default)]
pub struct Updates {
    resources: Mutex<HashMap<String, LinuxContainerResources>>,
}

impl Updates {
    /// The last update of a container.
    pub fn get(&self, id: &str) -> Option<LinuxContainerResources> {
        lock(&self.resources).get(id).cloned()
    }

    /// Notes an update: a field that it leaves at zero keeps what `before` has.
    pub fn set(
        &self,
        id: &str,
        before: Option<LinuxContainerResources>,
        update: LinuxContainerResources,
    ) {
        let merged = merge(before.unwrap_or_default(), update);
        lock(&self.resources).insert(id.to_owned(), merged);
    }

    /// The container is gone.
    pub fn remove(&self, id: &str) {
        lock(&self.resources).remove(id);
    }
}

fn merge(
    mut have: LinuxContainerResources,
    update: LinuxContainerResources,
) -> LinuxContainerResources {
    for (old, new) in [
        (&mut have.cpu_period, update.cpu_period),
        (&mut have.cpu_quota, update.cpu_quota),
        (&mut have.cpu_shares, update.cpu_shares),
        (
            &mut have.memory_limit_in_bytes,
            update.memory_limit_in_bytes,
        ),
        (
            &mut have.memory_swap_limit_in_bytes,
            update.memory_swap_limit_in_bytes,
        ),
        (&mut have.oom_score_adj, update.oom_score_adj),
    ] {
        if new != 0 {
            *old = new;
        }
    }
    for (old, new) in [
        (&mut have.cpuset_cpus, update.cpuset_cpus),
        (&mut have.cpuset_mems, update.cpuset_mems),
    ] {
        if !new.is_empty() {
            *old = new;
        }
    }
    have.unified.extend(update.unified);
    have
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_keeps_what_was() {
        let before = LinuxContainerResources {
            cpu_shares: 2,
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        let update = LinuxContainerResources {
            memory_limit_in_bytes: 9,
            ..Default::default()
        };
        let updates = Updates::default();
        updates.set("a", Some(before), update);
        let now = updates.get("a").unwrap();
        assert_eq!(
            (
                now.cpu_shares,
                now.memory_limit_in_bytes,
                now.cpuset_cpus.as_str()
            ),
            (2, 9, "0")
        );
        updates.remove("a");
        assert_eq!(updates.get("a"), None);
    }
}
