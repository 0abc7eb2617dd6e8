//! [`HostPodTable`]: the pods and containers that containerd runs, with their ids, kept in a file.
//!
//! Every id is in the table before a client learns it, so an id that is in neither the table nor the runtime's database
//! exists on neither side, also while containerd is down. The file serves only a start of the daemon while containerd is
//! down: a list of containerd replaces it. States are those of the last list.

use boxlite_proto::cri::v1::{
    Container, ContainerState, PodSandbox, PodSandboxMetadata, PodSandboxState,
};
use boxlite_sys::replace_file::replace_synced;
use boxlite_sys::sync::Mutex;
use prost::Message;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::path::PathBuf;

/// Rule of pods that were not started by this daemon, for the log.
const ADOPTED: &str = "it was in the container runtime's list";

/// Contents of the file.
#[derive(Clone, PartialEq, Message)]
struct Stored {
    #[prost(message, repeated, tag = "1")]
    pods: Vec<HostPod>,
    #[prost(message, repeated, tag = "2")]
    containers: Vec<Container>,
    /// Driver of the last RuntimeConfig.
    #[prost(int32, optional, tag = "3")]
    cgroup_driver: Option<i32>,
}

/// A pod without a VM.
#[derive(Clone, PartialEq, Message)]
pub(super) struct HostPod {
    #[prost(message, optional, tag = "1")]
    pub pod: Option<PodSandbox>,
    /// The rule that selected it.
    #[prost(string, tag = "2")]
    pub rule: String,
}

impl HostPod {
    /// Returns the pod's id.
    pub(super) fn id(&self) -> &str {
        self.pod.as_ref().map_or("", |pod| &pod.id)
    }
}

#[derive(Debug, Default)]
struct Entries {
    pods: BTreeMap<String, HostPod>,
    containers: BTreeMap<String, Container>,
    cgroup_driver: Option<i32>,
}

/// The table and its file.
#[derive(Debug)]
pub(super) struct HostPodTable {
    path: PathBuf,
    entries: Mutex<Entries>,
}

impl HostPodTable {
    /// Reads the file; a missing or damaged one gives an empty table, which the next list of containerd fills.
    pub(super) fn load(path: PathBuf) -> Self {
        let stored = match fs::read(&path) {
            Ok(bytes) => Stored::decode(&bytes[..]).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "failed to decode the table of host pods");
                Stored::default()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Stored::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "failed to read the table of host pods");
                Stored::default()
            }
        };
        let entries = Entries {
            pods: stored
                .pods
                .into_iter()
                .map(|pod| (pod.id().to_owned(), pod))
                .collect(),
            containers: by_id(stored.containers),
            cgroup_driver: stored.cgroup_driver,
        };
        Self {
            path,
            entries: Mutex::new(entries),
        }
    }

    /// Adds a pod that containerd has just started.
    pub(super) fn add_pod(&self, pod: PodSandbox, rule: String) {
        let id = pod.id.clone();
        let pod = Some(pod);
        self.change(|entries| entries.pods.insert(id, HostPod { pod, rule }));
    }

    /// Adds a container that containerd has just created.
    pub(super) fn add_container(&self, container: Container) {
        let id = container.id.clone();
        self.change(|entries| entries.containers.insert(id, container));
    }

    /// Removes a pod with its containers.
    pub(super) fn remove_pod(&self, id: &str) {
        self.change(|entries| {
            entries.pods.remove(id);
            entries.containers.retain(|_, c| c.pod_sandbox_id != id);
        });
    }

    /// Removes a container.
    pub(super) fn remove_container(&self, id: &str) {
        self.change(|entries| entries.containers.remove(id));
    }

    /// Returns the ids of all pods, for [`Self::listed_pods`].
    pub(super) fn pod_ids(&self) -> HashSet<String> {
        self.entries.lock().pods.keys().cloned().collect()
    }

    /// Returns the ids of all containers, for [`Self::listed_containers`].
    pub(super) fn container_ids(&self) -> HashSet<String> {
        self.entries.lock().containers.keys().cloned().collect()
    }

    /// Updates the table to a complete list of containerd. Only ids of `before`, the table before the call, can be gone: the
    /// others were added during it. Returns the pods that are new.
    pub(super) fn listed_pods(
        &self,
        before: &HashSet<String>,
        list: &[PodSandbox],
    ) -> Vec<HostPod> {
        let listed: HashSet<&str> = list.iter().map(|pod| pod.id.as_str()).collect();
        let mut entries = self.entries.lock();
        let count = entries.pods.len();
        entries
            .pods
            .retain(|id, _| listed.contains(id.as_str()) || !before.contains(id));
        let mut changed = entries.pods.len() != count;
        let mut added = Vec::new();
        for pod in list {
            match entries.pods.get_mut(&pod.id) {
                Some(known) => known.pod = Some(pod.clone()),
                // Removed during the call.
                None if before.contains(&pod.id) => {}
                None => {
                    let new = HostPod {
                        pod: Some(pod.clone()),
                        rule: ADOPTED.into(),
                    };
                    entries.pods.insert(pod.id.clone(), new.clone());
                    added.push(new);
                    changed = true;
                }
            }
        }
        if changed {
            self.save(&entries);
        }
        added
    }

    /// As [`Self::listed_pods`], for containers.
    pub(super) fn listed_containers(&self, before: &HashSet<String>, list: &[Container]) {
        let listed: HashSet<&str> = list.iter().map(|c| c.id.as_str()).collect();
        let mut entries = self.entries.lock();
        let count = entries.containers.len();
        entries
            .containers
            .retain(|id, _| listed.contains(id.as_str()) || !before.contains(id));
        let mut changed = entries.containers.len() != count;
        for container in list {
            let id = &container.id;
            if before.contains(id) && !entries.containers.contains_key(id) {
                continue;
            }
            changed |= entries
                .containers
                .insert(id.clone(), container.clone())
                .is_none();
        }
        if changed {
            self.save(&entries);
        }
    }

    /// Returns all pods with their rules.
    pub(super) fn pods(&self) -> Vec<HostPod> {
        self.entries.lock().pods.values().cloned().collect()
    }

    /// Returns the pods as they are reported while containerd is down: the CRI has no unknown state of a pod sandbox.
    pub(super) fn unknown_pods(&self) -> Vec<PodSandbox> {
        let pods = self.pods().into_iter().filter_map(|pod| pod.pod);
        pods.map(|pod| PodSandbox {
            state: PodSandboxState::SandboxNotready as i32,
            ..pod
        })
        .collect()
    }

    /// Returns the containers as they are reported while containerd is down.
    pub(super) fn unknown_containers(&self) -> Vec<Container> {
        let containers = self.entries.lock().containers.clone();
        containers
            .into_values()
            .map(|container| Container {
                state: ContainerState::ContainerUnknown as i32,
                ..container
            })
            .collect()
    }

    /// Returns the ids of pods that `prefix` selects: the exact one alone, if it exists.
    pub(super) fn matching_pods(&self, prefix: &str) -> Vec<String> {
        matching(&self.entries.lock().pods, prefix)
    }

    /// Returns the ids of containers that `prefix` selects: the exact one alone, if it exists.
    pub(super) fn matching_containers(&self, prefix: &str) -> Vec<String> {
        matching(&self.entries.lock().containers, prefix)
    }

    /// Returns whether a pod of this name, namespace and uid is in the table.
    pub(super) fn has_pod(&self, wanted: &PodSandboxMetadata) -> bool {
        self.pods().iter().any(|pod| {
            let metadata = pod.pod.as_ref().and_then(|pod| pod.metadata.as_ref());
            metadata.is_some_and(|metadata| {
                (&metadata.name, &metadata.namespace, &metadata.uid)
                    == (&wanted.name, &wanted.namespace, &wanted.uid)
            })
        })
    }

    /// Returns the stored cgroup driver.
    pub(super) fn cgroup_driver(&self) -> Option<i32> {
        self.entries.lock().cgroup_driver
    }

    /// Stores containerd's cgroup driver.
    pub(super) fn set_cgroup_driver(&self, driver: i32) {
        if self.cgroup_driver() != Some(driver) {
            self.change(|entries| entries.cgroup_driver = Some(driver));
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Entries) -> T) {
        let mut entries = self.entries.lock();
        change(&mut entries);
        self.save(&entries);
    }

    /// Replaces the file. A failure fails no call: the table in memory is complete.
    fn save(&self, entries: &Entries) {
        let stored = Stored {
            pods: entries.pods.values().cloned().collect(),
            containers: entries.containers.values().cloned().collect(),
            cgroup_driver: entries.cgroup_driver,
        };
        let draft = self.path.with_extension("tmp");
        if let Err(error) = replace_synced(&self.path, &draft, &stored.encode_to_vec()) {
            tracing::warn!(path = %self.path.display(), %error, "failed to save the table of host pods");
        }
    }
}

fn by_id(containers: Vec<Container>) -> BTreeMap<String, Container> {
    let entry = |container: Container| (container.id.clone(), container);
    containers.into_iter().map(entry).collect()
}

fn matching<T>(entries: &BTreeMap<String, T>, prefix: &str) -> Vec<String> {
    if prefix.is_empty() {
        return Vec::new();
    }
    if entries.contains_key(prefix) {
        return vec![prefix.to_owned()];
    }
    let from = entries.range(prefix.to_owned()..).map(|(id, _)| id);
    from.take_while(|id| id.starts_with(prefix))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str) -> PodSandbox {
        PodSandbox {
            id: id.into(),
            metadata: Some(PodSandboxMetadata {
                name: id.into(),
                uid: format!("uid-{id}"),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn container(id: &str, pod: &str) -> Container {
        Container {
            id: id.into(),
            pod_sandbox_id: pod.into(),
            state: ContainerState::ContainerRunning as i32,
            ..Default::default()
        }
    }

    fn table(dir: &tempfile::TempDir) -> HostPodTable {
        HostPodTable::load(dir.path().join("host-pods.pb"))
    }

    #[test]
    fn table_survives_a_restart_with_unknown_states() {
        let dir = tempfile::tempdir().unwrap();
        let first = table(&dir);
        first.add_pod(pod("aa1"), "rule".into());
        first.add_container(container("c1", "aa1"));
        first.set_cgroup_driver(1);
        let again = table(&dir);
        assert_eq!(again.matching_pods("aa"), ["aa1"]);
        assert_eq!(again.pods()[0].rule, "rule");
        assert_eq!(again.cgroup_driver(), Some(1));
        let unknown = &again.unknown_containers()[0];
        assert_eq!(unknown.state, ContainerState::ContainerUnknown as i32);
        let unknown = &again.unknown_pods()[0];
        assert_eq!(unknown.state, PodSandboxState::SandboxNotready as i32);
        assert!(again.has_pod(pod("aa1").metadata.as_ref().unwrap()));
        again.remove_pod("aa1");
        let empty = table(&dir);
        assert!(empty.pods().is_empty() && empty.unknown_containers().is_empty());
    }

    #[test]
    fn damaged_file_gives_an_empty_table() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("host-pods.pb"), [0xff; 9]).unwrap();
        assert!(table(&dir).pods().is_empty());
    }

    #[test]
    fn matching_prefers_the_exact_id() {
        let dir = tempfile::tempdir().unwrap();
        let table = table(&dir);
        for id in ["ab", "abc", "abd", "b"] {
            table.add_pod(pod(id), String::new());
        }
        assert_eq!(table.matching_pods("ab"), ["ab"]);
        assert_eq!(table.matching_pods("a"), ["ab", "abc", "abd"]);
        assert_eq!(table.matching_pods("abd"), ["abd"]);
        assert!(table.matching_pods("").is_empty() && table.matching_pods("c").is_empty());
    }

    #[test]
    fn list_keeps_changes_made_during_the_call() {
        let dir = tempfile::tempdir().unwrap();
        let table = table(&dir);
        for id in ["gone", "kept", "removed"] {
            table.add_pod(pod(id), "rule".into());
        }
        let before = table.pod_ids();
        // During the call.
        table.remove_pod("removed");
        table.add_pod(pod("started"), "rule".into());
        let list = [pod("kept"), pod("removed"), pod("found")];
        let added = table.listed_pods(&before, &list);
        let rules: Vec<_> = table
            .pods()
            .into_iter()
            .map(|pod| (pod.id().to_owned(), pod.rule))
            .collect();
        let expected = [("found", ADOPTED), ("kept", "rule"), ("started", "rule")];
        assert_eq!(
            rules,
            expected.map(|(id, rule)| (id.to_owned(), rule.to_owned()))
        );
        assert_eq!(added.len(), 1);
    }
}
