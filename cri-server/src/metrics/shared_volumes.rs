//! [`SharedVolumes`]: recognizes host directories that several pods mount with write access, for a warning and a metric.
//!
//! File locks of a VM do not reach the host, since neither virtiofsd nor libkrun implements FUSE locks, so programs in two
//! pods that guard their files by locks (databases) would ruin them. The shims refuse such mounts if the configuration says
//! so; this record knows only the pods of this daemon. Kept in memory, and filled from the stored containers at the start.

use boxlite_proto::cri::v1::{ContainerConfig, Mount};
use boxlite_sys::sync::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;

/// Device and inode of a directory. Pods have different paths to the same directory of a network file system.
type Directory = (u64, u64);

/// Pods by the directories that they mount with write access.
#[derive(Debug, Default)]
pub(crate) struct SharedVolumes(Mutex<HashMap<Directory, BTreeSet<String>>>);

impl SharedVolumes {
    /// Records the mounts of a new container of `pod` and logs a warning for each directory that `pod` is the second or a
    /// later pod to mount with write access. Pods for which `exists` is false are forgotten. Blocks.
    pub(crate) fn add(&self, pod: &str, config: &ContainerConfig, exists: impl Fn(&str) -> bool) {
        for (mount, directory) in directories(config) {
            if let Some(other) = self.record(directory, pod, &exists) {
                tracing::warn!(
                    volume = mount.host_path,
                    pod,
                    other_pod = other,
                    "volume is writable in another pod, too: file locks do not reach beyond a pod (docs/volumes.md)"
                );
            }
        }
    }

    /// Records the mounts of a container of an earlier run without a warning. Blocks.
    pub(crate) fn restore(&self, pod: &str, config: &ContainerConfig) {
        for (_, directory) in directories(config) {
            self.record(directory, pod, |_| true);
        }
    }

    /// Returns the number of directories that more than one of the pods for which `is_live` is true mount.
    pub(super) fn shared(&self, is_live: impl Fn(&str) -> bool) -> usize {
        let volumes = self.0.lock();
        let of_several =
            |pods: &&BTreeSet<String>| pods.iter().filter(|id| is_live(id)).count() > 1;
        volumes.values().filter(of_several).count()
    }

    /// Returns another pod that has the directory, if `pod` is new to it.
    fn record(
        &self,
        directory: Directory,
        pod: &str,
        exists: impl Fn(&str) -> bool,
    ) -> Option<String> {
        let mut volumes = self.0.lock();
        volumes.retain(|_, pods| {
            pods.retain(|id| id == pod || exists(id));
            !pods.is_empty()
        });
        let pods = volumes.entry(directory).or_default();
        let other = pods.iter().find(|id| *id != pod).cloned();
        pods.insert(pod.to_owned()).then_some(other).flatten()
    }
}

/// Returns the mounts of host directories with write access.
fn directories(config: &ContainerConfig) -> impl Iterator<Item = (&Mount, Directory)> {
    let writable = config.mounts.iter().filter(|mount| is_writable(mount));
    writable.filter_map(|mount| {
        let facts = std::fs::metadata(&mount.host_path).ok()?;
        let directory = (facts.dev(), facts.ino());
        facts.is_dir().then_some((mount, directory))
    })
}

fn is_writable(mount: &Mount) -> bool {
    !mount.readonly && mount.image.is_none() && !mount.host_path.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_returns_the_other_pod_once_while_it_exists() {
        let volumes = SharedVolumes::default();
        let all = |_: &str| true;
        assert_eq!(volumes.record((1, 2), "a", all), None);
        assert_eq!(volumes.record((1, 2), "a", all), None);
        assert_eq!(volumes.record((1, 3), "b", all), None);
        assert_eq!(volumes.record((1, 2), "b", all).as_deref(), Some("a"));
        assert_eq!(volumes.record((1, 2), "b", all), None, "reported once");
        assert_eq!(
            volumes.record((1, 2), "c", |id| id != "a").as_deref(),
            Some("b")
        );
        assert_eq!(volumes.record((1, 2), "d", |_| false), None);
        assert_eq!(
            volumes.0.lock().len(),
            1,
            "pods that are gone are forgotten"
        );
    }

    #[test]
    fn shared_counts_directories_of_several_live_pods() {
        let volumes = SharedVolumes::default();
        let all = |_: &str| true;
        for (directory, pod) in [((1, 1), "a"), ((1, 1), "b"), ((1, 2), "a"), ((1, 1), "c")] {
            volumes.record(directory, pod, all);
        }
        assert_eq!(volumes.shared(all), 1);
        assert_eq!(volumes.shared(|id| id != "a"), 1);
        assert_eq!(volumes.shared(|id| id == "a"), 0);
    }

    #[test]
    fn restore_makes_the_next_pod_the_second() {
        let dir = tempfile::tempdir().unwrap();
        let config = ContainerConfig {
            mounts: vec![Mount {
                host_path: dir.path().display().to_string(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let volumes = SharedVolumes::default();
        volumes.restore("a", &config);
        let (_, directory) = directories(&config).next().unwrap();
        let other = volumes.record(directory, "b", |_| true);
        assert_eq!(other.as_deref(), Some("a"));
    }

    #[test]
    fn is_writable_excludes_read_only_and_image_mounts() {
        let mount = |readonly| Mount {
            host_path: "/srv".into(),
            readonly,
            ..Default::default()
        };
        assert!(is_writable(&mount(false)));
        assert!(!is_writable(&mount(true)));
        let image = Mount {
            image: Some(Default::default()),
            ..mount(false)
        };
        assert!(!is_writable(&image));
    }
}
