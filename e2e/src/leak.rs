//! [`Trace`]: what a pod could leave on a node: processes, mounts, network namespaces, cgroups, interfaces, IPAM leases,
//! sockets and files of the state directory. Two of them compared are the leak check.
//!
//! Reads only. Sees this enclave's own namespaces, so that other work on the machine makes no noise.

use crate::node::Node;
use crate::outcome::Result;
use crate::{ensure, wait};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Names of things, by kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trace(BTreeMap<&'static str, Vec<String>>);

/// What is removed may be gone a moment after the answer (a killed process in exit, an unmount that is lazy).
const SETTLE: Duration = Duration::from_secs(10);

impl Trace {
    /// Looks now.
    pub fn take(node: &Node) -> Result<Self> {
        let mut kinds = BTreeMap::new();
        kinds.insert("processes", processes()?);
        kinds.insert("mounts", mounts()?);
        kinds.insert("network namespaces", names("/run/netns".as_ref()));
        kinds.insert("interfaces", interfaces()?);
        kinds.insert("cgroups", cgroups());
        kinds.insert(
            "leases",
            names(&node.leases())
                .into_iter()
                .filter(|n| n.contains(['.', ':']) && !n.starts_with("last_"))
                .collect(),
        );
        // Directories that the first pod makes for all stay; what is in them must not. Images and what is derived from the
        // installation once are no pod's.
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

    /// How many of each.
    pub fn counts(&self) -> String {
        self.0
            .iter()
            .map(|(kind, list)| format!("{kind} {}", list.len()))
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// What `self` has and `before` had not.
    pub fn beyond(&self, before: &Self) -> Vec<String> {
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

    /// Fails unless everything beyond `self` is gone, now or in a moment.
    pub async fn restored(&self, node: &Node) -> Result<Self> {
        wait::until("everything a pod had is gone", SETTLE, || async {
            let now = Self::take(node)?;
            let more = now.beyond(self);
            ensure!(more.is_empty(), "left behind:\n  {}", more.join("\n  "));
            Ok(now)
        })
        .await
    }
}

/// Programs of the product in this PID namespace, by name; zombies too.
fn processes() -> Result<Vec<String>> {
    const OURS: [&str; 6] = [
        "containerd-shim",
        "qemu-system",
        "virtiofsd",
        "vhost-device",
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
    Ok(text
        .lines()
        .filter_map(|l| l.split(' ').nth(4))
        .map(str::to_owned)
        .collect())
}

/// Interfaces but for the bridge, which CNI keeps.
fn interfaces() -> Result<Vec<String>> {
    let text = std::fs::read_to_string("/proc/net/dev")?;
    let names = text.lines().skip(2).filter_map(|l| l.split(':').next());
    Ok(names
        .map(|n| n.trim().to_owned())
        .filter(|n| !n.starts_with("bx"))
        .collect())
}

/// Cgroups with a name of ours, on every hierarchy.
fn cgroups() -> Vec<String> {
    tree("/sys/fs/cgroup".as_ref(), 5)
        .into_iter()
        .filter(|p| p.contains("boxlite-e2e"))
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

/// Paths below `dir` down to `depth`, relative to it.
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
