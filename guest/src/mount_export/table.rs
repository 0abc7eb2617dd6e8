//! Finds mounts below Bidirectional volumes in a container's mount table: [`volumes`] and [`find`]. Pure functions.
//!
//! Excluded are mounts made before the container started, mounts of the host (submounts of virtiofs), and mounts
//! below an exported one, which are part of its tree.

use boxlite_proto::names::GUEST_SHARE;
use boxlite_sys::mountinfo::{Mount, mounts};
use oci_spec::runtime::Spec;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Maximum length of a path below a volume, in bytes; the host rejects longer ones.
const MAX_PATH_BYTES: usize = 1024;

/// A Bidirectional volume of the spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BidirectionalVolume {
    /// Mount point in the container.
    pub destination: PathBuf,
    /// Path below the share.
    pub share_path: String,
}

/// A volume that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountedVolume {
    spec: BidirectionalVolume,
    /// ID of its mount.
    mount: u64,
}

/// A mount made by the container below a volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct FoundMount {
    /// Mount ID.
    pub mount: u64,
    /// Device and root of the mount; the kernel reuses mount IDs.
    pub origin: String,
    /// Mount point in the container.
    pub point: PathBuf,
    /// Path of the volume below the share.
    pub share_path: String,
    /// Path of the mount point below the volume.
    pub path: String,
    /// True if the mount is read-only.
    pub read_only: bool,
}

/// Replaces the propagation Bidirectional by HostToContainer in `spec`, because the VM's kernel cannot propagate
/// mounts to the host. Returns the affected volumes.
pub(crate) fn take_bidirectional(spec: &mut Spec) -> Vec<BidirectionalVolume> {
    let mut taken = Vec::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let mut options = mount.options().clone().unwrap_or_default();
        let mut both = false;
        for option in &mut options {
            if option == "rshared" || option == "shared" {
                both = true;
                *option = "rslave".to_owned();
            }
        }
        if !both {
            continue;
        }
        mount.set_options(Some(options));
        let source = mount.source().clone().unwrap_or_default();
        if let Some(share_path) = source.strip_prefix(GUEST_SHARE).ok().and_then(Path::to_str) {
            taken.push(BidirectionalVolume {
                destination: mount.destination().clone(),
                share_path: share_path.to_owned(),
            });
        }
    }
    if taken.is_empty() {
        return taken;
    }
    spec.set_mounts(Some(mounts));
    // containerd also sets the root to shared, which pivot_root rejects.
    if let Some(mut linux) = spec.linux().clone() {
        linux.set_rootfs_propagation(None);
        spec.set_linux(Some(linux));
    }
    taken
}

/// Returns the volumes found in the mount table of a container that has not started, and the IDs of all its mounts.
pub(crate) fn volumes(
    table: &str,
    specs: Vec<BidirectionalVolume>,
) -> (Vec<MountedVolume>, HashSet<u64>) {
    let lines: Vec<Mount> = mounts(table).collect();
    let volumes = specs.into_iter().filter_map(|spec| {
        let mut at = lines.iter().rev();
        let mount = at.find(|line| line.point == spec.destination)?.id;
        Some(MountedVolume { spec, mount })
    });
    let volumes = volumes.collect();
    (volumes, lines.iter().map(|line| line.id).collect())
}

/// Returns the container's own mounts below its volumes. `initial` holds the IDs of the mounts it started with.
pub(crate) fn find(
    table: &str,
    volumes: &[MountedVolume],
    initial: &HashSet<u64>,
) -> Vec<FoundMount> {
    let lines: Vec<Mount> = mounts(table).collect();
    // The first mount of a device is the submount itself; later ones are binds of it.
    let mut devices: HashMap<&str, u64> = HashMap::new();
    for line in &lines {
        devices.entry(line.device).or_insert(line.id);
    }
    let of_host = |line: &Mount| {
        line.kind == "virtiofs" && line.root == "/" && devices.get(line.device) == Some(&line.id)
    };
    // IDs of mounts on which new mounts are exported, with the index of their volume.
    let mut below: HashMap<u64, usize> = HashMap::new();
    for (index, volume) in volumes.iter().enumerate() {
        below.insert(volume.mount, index);
    }
    let mut found = Vec::new();
    for line in &lines {
        let Some(&index) = below.get(&line.parent) else {
            continue;
        };
        if of_host(line) {
            below.insert(line.id, index);
            continue;
        }
        if initial.contains(&line.id) {
            continue;
        }
        let volume = &volumes[index].spec;
        let Some(path) = line
            .point
            .strip_prefix(&volume.destination)
            .ok()
            .and_then(Path::to_str)
            .filter(|path| !path.is_empty() && path.len() <= MAX_PATH_BYTES)
        else {
            continue;
        };
        found.push(FoundMount {
            mount: line.id,
            origin: format!("{} {}", line.device, line.root),
            point: line.point.clone(),
            share_path: volume.share_path.clone(),
            path: path.to_owned(),
            read_only: line.is_read_only(),
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "\
20 1 0:30 / / rw - overlay overlay rw
21 20 0:40 /m/abc /vol rw,relatime master:3 - virtiofs share rw
22 20 0:41 / /proc rw - proc proc rw
23 21 0:42 / /vol/own rw - tmpfs tmpfs rw
24 20 0:40 /m/other /plain rw - virtiofs share rw
";

    fn started() -> (Vec<MountedVolume>, HashSet<u64>) {
        let volume = BidirectionalVolume {
            destination: "/vol".into(),
            share_path: "m/abc".into(),
        };
        volumes(BEFORE, vec![volume])
    }

    fn paths(more: &str) -> Vec<String> {
        let (volumes, initial) = started();
        let table = format!("{BEFORE}{more}");
        let found = find(&table, &volumes, &initial);
        found.into_iter().map(|found| found.path).collect()
    }

    #[test]
    fn find_returns_mounts_of_the_container() {
        assert!(paths("").is_empty());
        let more = r"
30 21 0:50 / /vol/a\040b rw - tmpfs tmpfs rw
31 21 0:30 /etc /vol/etc/deep ro,relatime - overlay overlay rw
32 20 0:51 / /elsewhere rw - tmpfs tmpfs rw
33 24 0:52 / /plain/x rw - tmpfs tmpfs rw
34 21 0:40 /m/abc/sub /vol/bind rw - virtiofs share rw
nonsense";
        assert_eq!(paths(more), ["a b", "etc/deep", "bind"]);
        let (volumes, initial) = started();
        let found = find(&format!("{BEFORE}{more}"), &volumes, &initial);
        assert_eq!(
            found.iter().map(|f| f.read_only).collect::<Vec<_>>(),
            [false, true, false]
        );
        assert_eq!(found[1].share_path, "m/abc");
        assert_eq!(found[1].point, Path::new("/vol/etc/deep"));
    }

    #[test]
    fn find_skips_host_mounts_and_nested_mounts() {
        let more = "
30 21 0:60 / /vol/host rw - virtiofs share rw
31 30 0:61 / /vol/host/mine rw - tmpfs tmpfs rw
32 31 0:62 / /vol/host/mine/below rw - tmpfs tmpfs rw
33 21 0:60 / /vol/again rw - virtiofs share rw
34 21 0:63 / /vol rw - tmpfs tmpfs rw";
        assert_eq!(paths(more), ["host/mine", "again"]);
    }

    #[test]
    fn find_skips_paths_above_the_limit() {
        let name = "x".repeat(MAX_PATH_BYTES + 1);
        assert!(paths(&format!("30 21 0:60 / /vol/{name} rw - tmpfs t rw")).is_empty());
    }

    #[test]
    fn take_bidirectional_replaces_shared_by_rslave() {
        let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"rootfsPropagation": "rshared"}, "mounts": [
            {"destination": "/vol", "type": "bind", "source": "/run/boxlite/share/m/abc", "options": ["rbind", "rshared", "rw"]},
            {"destination": "/x", "type": "bind", "source": "/run/boxlite/share/m/x", "options": ["rbind", "rprivate"]},
        ]});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let taken = take_bidirectional(&mut spec);
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].share_path, "m/abc");
        let mounts = spec.mounts().as_ref().unwrap();
        let options = |at: usize| mounts[at].options().clone().unwrap();
        assert_eq!(options(0), ["rbind", "rslave", "rw"]);
        assert_eq!(options(1), ["rbind", "rprivate"]);
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.rootfs_propagation().is_none());
    }
}
