//! [`LeakSnapshot`]: everything a pod could leave on a node: processes, mounts, network namespaces, cgroups, interfaces,
//! IPAM leases, sockets and files of the state directory. The leak check compares two of them.
//!
//! Read-only. Covers this program's namespaces, so other work on the machine does not interfere.

use crate::failure::Result;
use crate::namespaces::{SCRATCH_PREFIX, scratch};
use crate::node::Node;
use crate::{cgroups, ensure, poll};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Names of objects by kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct LeakSnapshot(BTreeMap<&'static str, Vec<String>>);

/// Time for removals that complete after the answer (an exiting process, a lazy unmount).
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

impl LeakSnapshot {
    /// Takes a snapshot.
    pub(crate) fn take(node: &Node) -> Result<Self> {
        let mut kinds = BTreeMap::new();
        kinds.insert("processes", processes()?);
        kinds.insert("mounts", mounts()?);
        kinds.insert("network namespaces", names("/run/netns".as_ref()));
        kinds.insert("interfaces", interfaces()?);
        kinds.insert("cgroups", product_cgroups());
        kinds.insert(
            "leases",
            names(&node.leases())
                .into_iter()
                .filter(|n| n.contains(['.', ':']) && !n.starts_with("last_"))
                .collect(),
        );
        // Directories created by the first pod remain and must be empty. Images and files derived once from the
        // installation do not belong to a pod.
        let of_pod =
            |n: &String| n.contains('/') && !n.starts_with("images/") && !n.starts_with("cache/");
        kinds.insert(
            "state files",
            tree(&node.dir.join("state"), 3)
                .into_iter()
                .filter(of_pod)
                .collect(),
        );
        kinds.insert(
            "root files",
            tree(&node.dir.join("root"), 3)
                .into_iter()
                .filter(of_pod)
                .collect(),
        );
        for list in kinds.values_mut() {
            list.sort();
        }
        Ok(Self(kinds))
    }

    /// Returns the number of objects by kind.
    pub(crate) fn counts(&self) -> String {
        self.0
            .iter()
            .map(|(kind, list)| format!("{kind} {}", list.len()))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Returns the objects of `self` that `before` does not have.
    pub(crate) fn beyond(&self, before: &Self) -> Vec<String> {
        let mut more = Vec::new();
        for (kind, list) in &self.0 {
            let mut old = before.0.get(kind).cloned().unwrap_or_default();
            for name in list {
                match old.iter().position(|o| o == name) {
                    Some(at) => drop(old.swap_remove(at)),
                    None => more.push(format!("{kind}: {name}")),
                }
            }
        }
        more
    }

    /// Waits until no objects beyond `self` exist, and fails after a time limit.
    pub(crate) async fn restored(&self, node: &Node) -> Result<Self> {
        self.restored_within(node, SETTLE_TIMEOUT).await
    }

    /// Does the same with another limit: a kubelet unmounts volumes some time after a pod's end.
    pub(crate) async fn restored_within(&self, node: &Node, limit: Duration) -> Result<Self> {
        poll::until("all objects of the pod are removed", limit, || async {
            let now = Self::take(node)?;
            let more = now.beyond(self);
            ensure!(more.is_empty(), "leaked:\n  {}", more.join("\n  "));
            Ok(now)
        })
        .await
    }

    /// Does the same for a node whose daemon was restarted since: its process is another one.
    pub(crate) async fn restored_by_another_daemon(&self, node: &Node, limit: Duration) -> Result {
        poll::until("all objects of the pod are removed", limit, || async {
            let mut more = Self::take(node)?.beyond(self);
            more.retain(|name| !name.contains("boxlite-cri"));
            ensure!(more.is_empty(), "leaked:\n  {}", more.join("\n  "));
            Ok(())
        })
        .await
    }
}

/// Returns the product's processes in this PID namespace by name, including zombies.
fn processes() -> Result<Vec<String>> {
    const OURS: [&str; 7] = [
        "containerd-shim",
        "qemu-system",
        "virtiofsd",
        "vhost-device",
        "passt",
        "boxlite-cri",
        "vmm",
    ];
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else {
            continue;
        };
        if OURS.iter().any(|o| name.starts_with(o)) {
            let args = std::fs::read(path.join("cmdline")).unwrap_or_default();
            let args = String::from_utf8_lossy(&args).replace('\0', " ");
            found.push(format!(
                "{} {}",
                name.trim(),
                args.chars().take(160).collect::<String>()
            ));
        }
    }
    Ok(found)
}

fn mounts() -> Result<Vec<String>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let points = boxlite_sys::mountinfo::mounts(&text).map(|mount| mount.point);
    Ok(points.map(|point| point.display().to_string()).collect())
}

/// Returns the interfaces, except the bridge, which CNI keeps.
fn interfaces() -> Result<Vec<String>> {
    let text = std::fs::read_to_string("/proc/net/dev")?;
    let names = text.lines().skip(2).filter_map(|l| l.split(':').next());
    Ok(names
        .map(|n| n.trim().to_owned())
        .filter(|n| !n.starts_with("bx"))
        .collect())
}

/// Returns true if the path is that of the cgroup of another run on this machine, or below it.
pub(crate) fn is_of_another_run(path: &str) -> bool {
    let of_any = cgroups::name(SCRATCH_PREFIX.as_ref());
    path.contains(&of_any) && !path.contains(&cgroups::name(&scratch()))
}

/// Returns the product's cgroups on every hierarchy, except a kubelet's cgroups of all pods of a QoS class: it creates them
/// again when they are missing. Files of a cgroup come with their directory.
fn product_cgroups() -> Vec<String> {
    const MOUNT: &str = "/sys/fs/cgroup";
    const OF_ALL_PODS: [&str; 3] = ["/kubepods", "/kubepods/burstable", "/kubepods/besteffort"];
    tree(MOUNT.as_ref(), 5)
        .into_iter()
        .filter(|p| p.contains("boxlite-e2e") && Path::new(MOUNT).join(p).is_dir())
        .filter(|p| !OF_ALL_PODS.iter().any(|end| p.ends_with(end)))
        .filter(|p| !is_of_another_run(p))
        .collect()
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|e| Some(e.ok()?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// Returns the paths below `dir` to a depth of `depth`, relative to it.
fn tree(dir: &Path, depth: usize) -> Vec<String> {
    let mut found = Vec::new();
    for name in names(dir) {
        let path = dir.join(&name);
        if depth > 1 && path.is_dir() && !path.is_symlink() {
            found.extend(
                tree(&path, depth - 1)
                    .into_iter()
                    .map(|below| format!("{name}/{below}")),
            );
        }
        found.push(name);
    }
    found
}
