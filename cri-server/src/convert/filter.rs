//! Filters of the list calls: id prefix, state, pod, labels.

use boxlite_proto::cri::v1::{
    Container, ContainerFilter, ContainerStatsFilter, PodSandbox, PodSandboxFilter,
    PodSandboxStatsFilter,
};
use std::collections::HashMap;

/// Returns whether `id` starts with `wanted`; an empty prefix matches all.
pub(crate) fn id(wanted: &str, id: &str) -> bool {
    id.starts_with(wanted)
}

/// Returns whether `labels` has every pair of `selector`.
pub(crate) fn labels(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// Returns whether a pod sandbox matches the filter.
pub(crate) fn sandbox(filter: Option<&PodSandboxFilter>, sandbox: &PodSandbox) -> bool {
    filter.is_none_or(|filter| {
        id(&filter.id, &sandbox.id)
            && filter
                .state
                .as_ref()
                .is_none_or(|wanted| wanted.state == sandbox.state)
            && labels(&filter.label_selector, &sandbox.labels)
    })
}

/// Returns whether a container matches the filter.
pub(crate) fn container(filter: Option<&ContainerFilter>, container: &Container) -> bool {
    filter.is_none_or(|filter| {
        id(&filter.id, &container.id)
            && id(&filter.pod_sandbox_id, &container.pod_sandbox_id)
            && filter
                .state
                .as_ref()
                .is_none_or(|wanted| wanted.state == container.state)
            && labels(&filter.label_selector, &container.labels)
    })
}

/// Converts a stats filter to a list filter.
pub(crate) fn of_container_stats(filter: Option<ContainerStatsFilter>) -> Option<ContainerFilter> {
    filter.map(|filter| ContainerFilter {
        id: filter.id,
        pod_sandbox_id: filter.pod_sandbox_id,
        label_selector: filter.label_selector,
        state: None,
    })
}

/// Converts a stats filter to a list filter.
pub(crate) fn of_sandbox_stats(filter: Option<PodSandboxStatsFilter>) -> Option<PodSandboxFilter> {
    filter.map(|filter| PodSandboxFilter {
        id: filter.id,
        label_selector: filter.label_selector,
        state: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::cri::v1::{ContainerStateValue, PodSandboxStateValue};
    use proptest::prelude::*;

    fn pairs(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    fn pod() -> PodSandbox {
        PodSandbox {
            id: "abcdef".into(),
            state: 1,
            labels: pairs(&[("a", "1"), ("b", "2")]),
            ..Default::default()
        }
    }

    #[test]
    fn sandbox_filter_matches_all_its_fields() {
        let wanted = |id: &str, state: Option<i32>, labels: &[(&str, &str)]| {
            let filter = PodSandboxFilter {
                id: id.into(),
                state: state.map(|state| PodSandboxStateValue { state }),
                label_selector: pairs(labels),
            };
            sandbox(Some(&filter), &pod())
        };
        assert!(sandbox(None, &pod()));
        assert!(wanted("", None, &[]));
        assert!(wanted("abc", Some(1), &[("a", "1")]));
        assert!(!wanted("abd", None, &[]));
        assert!(!wanted("abcdef0", None, &[]));
        assert!(!wanted("", Some(0), &[]));
        assert!(!wanted("", None, &[("a", "2")]));
        assert!(!wanted("", None, &[("a", "1"), ("c", "1")]));
    }

    #[test]
    fn container_filter_matches_all_its_fields() {
        let have = Container {
            id: "c0ffee".into(),
            pod_sandbox_id: "abcdef".into(),
            state: 1,
            ..Default::default()
        };
        let wanted = |id: &str, pod: &str, state: Option<i32>| {
            let filter = ContainerFilter {
                id: id.into(),
                pod_sandbox_id: pod.into(),
                state: state.map(|state| ContainerStateValue { state }),
                label_selector: HashMap::new(),
            };
            container(Some(&filter), &have)
        };
        assert!(wanted("", "", None));
        assert!(wanted("c0", "ab", Some(1)));
        assert!(!wanted("c0", "b", None));
        assert!(!wanted("c1", "", None));
        assert!(!wanted("", "", Some(2)));
    }

    proptest! {
        #[test]
        fn every_subset_of_the_labels_selects(all in prop::collection::hash_map("[a-d]", "[a-d]", 0..4), keep in any::<u8>()) {
            let some: HashMap<_, _> = all.iter().enumerate()
                .filter(|(i, _)| keep >> i & 1 == 1)
                .map(|(_, (k, v))| (k.clone(), v.clone()))
                .collect();
            prop_assert!(labels(&some, &all));
            if some.len() < all.len() {
                prop_assert!(!labels(&all, &some));
            }
        }
    }
}
