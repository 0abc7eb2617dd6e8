//! Resource limits of the CRI as [`Limits`], the form in which boxlite-config sizes VMs, and merging of updates.

use boxlite_config::size::Limits;
use boxlite_proto::cri::v1::LinuxContainerResources;

/// Converts limits; absent resources mean unlimited.
pub(crate) fn limits(resources: Option<&LinuxContainerResources>) -> Limits {
    resources
        .map(|resources| Limits {
            memory_bytes: resources.memory_limit_in_bytes,
            cpu_quota_us: resources.cpu_quota,
            cpu_period_us: resources.cpu_period,
        })
        .unwrap_or_default()
}

/// Merges an update into `current`; a field that the update leaves at zero keeps its value.
pub(crate) fn merge(current: &mut LinuxContainerResources, update: &LinuxContainerResources) {
    for (old, new) in [
        (&mut current.cpu_period, update.cpu_period),
        (&mut current.cpu_quota, update.cpu_quota),
        (&mut current.cpu_shares, update.cpu_shares),
        (
            &mut current.memory_limit_in_bytes,
            update.memory_limit_in_bytes,
        ),
        (
            &mut current.memory_swap_limit_in_bytes,
            update.memory_swap_limit_in_bytes,
        ),
        (&mut current.oom_score_adj, update.oom_score_adj),
    ] {
        if new != 0 {
            *old = new;
        }
    }
    for (old, new) in [
        (&mut current.cpuset_cpus, &update.cpuset_cpus),
        (&mut current.cpuset_mems, &update.cpuset_mems),
    ] {
        if !new.is_empty() {
            old.clone_from(new);
        }
    }
    current.unified.extend(update.unified.clone());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuset_in_host_numbers_is_admitted() {
        let update = LinuxContainerResources {
            cpuset_cpus: "3-17".into(),
            cpuset_mems: "0-1".into(),
            ..Default::default()
        };
        assert_eq!(
            limits(Some(&update)),
            Limits::default(),
            "no limit to check"
        );
    }
}
