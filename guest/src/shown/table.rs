//! Reads a container's mount table for mounts below its Bidirectional volumes: [`volumes`] and [`find`]. Pure.
//!
//! Not shown are mounts that were there when the container was made, mounts that came from the host (submounts of
//! virtiofs), and mounts below a shown one: that one shows them.

use boxlite_proto::names::GUEST_SHARE;
use boxlite_sys::mountinfo::{Mount, mounts};
use oci_spec::runtime::Spec;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Longest path below a volume, in bytes; the host takes no longer one.
const PATH_LIMIT: usize = 1024;

/// A volume as the spec wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Mount point in the container.
    pub destination: PathBuf,
    /// Path below the share.
    pub place: String,
}

/// A volume that is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    wanted: Wanted,
    /// Number of its mount.
    mount: u64,
}

/// A mount of the container's own below a volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Found {
    /// Number of the mount.
    pub mount: u64,
    /// Its file system and what of it is mounted: numbers are used again.
    pub what: String,
    /// Where in the container.
    pub point: PathBuf,
    /// The volume's path below the share.
    pub place: String,
    /// Path of the mount point below the volume.
    pub path: String,
    /// Nothing can be written.
    pub read_only: bool,
}

/// Takes the propagation Bidirectional out of `spec`, whose mounts the kernel of the VM cannot carry out to the host: for
/// it they are volumes that follow the host's mounts. Answers these volumes.
pub fn take_wanted(spec: &mut Spec) -> Vec<Wanted> {
    let mut wanted = Vec::new();
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
        if let Some(place) = source.strip_prefix(GUEST_SHARE).ok().and_then(Path::to_str) {
            wanted.push(Wanted {
                destination: mount.destination().clone(),
                place: place.to_owned(),
            });
        }
    }
    if wanted.is_empty() {
        return wanted;
    }
    spec.set_mounts(Some(mounts));
    // containerd makes the root so, too, and pivot_root refuses that.
    if let Some(mut linux) = spec.linux().clone() {
        linux.set_rootfs_propagation(None);
        spec.set_linux(Some(linux));
    }
    wanted
}

/// Finds the volumes in the table of a container that has not been started, and the numbers of all its mounts.
pub fn volumes(table: &str, wanted: Vec<Wanted>) -> (Vec<Volume>, HashSet<u64>) {
    let lines: Vec<Mount> = mounts(table).collect();
    let volumes = wanted.into_iter().filter_map(|wanted| {
        let mut at = lines.iter().rev();
        let mount = at.find(|line| line.point == wanted.destination)?.id;
        Some(Volume { wanted, mount })
    });
    let volumes = volumes.collect();
    (volumes, lines.iter().map(|line| line.id).collect())
}

/// The container's own mounts below its volumes. `first` are those that it began with.
pub fn find(table: &str, volumes: &[Volume], first: &HashSet<u64>) -> Vec<Found> {
    let lines: Vec<Mount> = mounts(table).collect();
    // The one that came first with a device is the submount itself, later ones are binds of it.
    let mut devices: HashMap<&str, u64> = HashMap::new();
    for line in &lines {
        devices.entry(line.device).or_insert(line.id);
    }
    let of_host = |line: &Mount| {
        line.kind == "virtiofs" && line.root == "/" && devices.get(line.device) == Some(&line.id)
    };
    // Mounts on which a new one is shown, by the index of their volume.
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
        if first.contains(&line.id) {
            continue;
        }
        let wanted = &volumes[index].wanted;
        let Some(path) = line
            .point
            .strip_prefix(&wanted.destination)
            .ok()
            .and_then(Path::to_str)
            .filter(|path| !path.is_empty() && path.len() <= PATH_LIMIT)
        else {
            continue;
        };
        found.push(Found {
            mount: line.id,
            what: format!("{} {}", line.device, line.root),
            point: line.point.clone(),
            place: wanted.place.clone(),
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

    fn started() -> (Vec<Volume>, HashSet<u64>) {
        let wanted = Wanted {
            destination: "/vol".into(),
            place: "m/abc".into(),
        };
        volumes(BEFORE, vec![wanted])
    }

    fn paths(more: &str) -> Vec<String> {
        let (volumes, first) = started();
        let table = format!("{BEFORE}{more}");
        let found = find(&table, &volumes, &first);
        found.into_iter().map(|found| found.path).collect()
    }

    #[test]
    fn the_containers_own_mounts_are_found() {
        assert!(paths("").is_empty());
        let more = r"
30 21 0:50 / /vol/a\040b rw - tmpfs tmpfs rw
31 21 0:30 /etc /vol/etc/deep ro,relatime - overlay overlay rw
32 20 0:51 / /elsewhere rw - tmpfs tmpfs rw
33 24 0:52 / /plain/x rw - tmpfs tmpfs rw
34 21 0:40 /m/abc/sub /vol/bind rw - virtiofs share rw
nonsense";
        assert_eq!(paths(more), ["a b", "etc/deep", "bind"]);
        let (volumes, first) = started();
        let found = find(&format!("{BEFORE}{more}"), &volumes, &first);
        assert_eq!(
            found.iter().map(|f| f.read_only).collect::<Vec<_>>(),
            [false, true, false]
        );
        assert_eq!(found[1].place, "m/abc");
        assert_eq!(found[1].point, Path::new("/vol/etc/deep"));
    }

    #[test]
    fn mounts_of_the_host_and_mounts_below_shown_ones_are_not() {
        let more = "
30 21 0:60 / /vol/host rw - virtiofs share rw
31 30 0:61 / /vol/host/mine rw - tmpfs tmpfs rw
32 31 0:62 / /vol/host/mine/below rw - tmpfs tmpfs rw
33 21 0:60 / /vol/again rw - virtiofs share rw
34 21 0:63 / /vol rw - tmpfs tmpfs rw";
        assert_eq!(paths(more), ["host/mine", "again"]);
    }

    #[test]
    fn long_paths_are_not_shown() {
        let name = "x".repeat(PATH_LIMIT + 1);
        assert!(paths(&format!("30 21 0:60 / /vol/{name} rw - tmpfs t rw")).is_empty());
    }

    #[test]
    fn bidirectional_is_taken_out_of_the_spec() {
        let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"rootfsPropagation": "rshared"}, "mounts": [
            {"destination": "/vol", "type": "bind", "source": "/run/boxlite/share/m/abc", "options": ["rbind", "rshared", "rw"]},
            {"destination": "/x", "type": "bind", "source": "/run/boxlite/share/m/x", "options": ["rbind", "rprivate"]},
        ]});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        let wanted = take_wanted(&mut spec);
        assert_eq!(wanted.len(), 1);
        assert_eq!(wanted[0].place, "m/abc");
        let mounts = spec.mounts().as_ref().unwrap();
        let options = |at: usize| mounts[at].options().clone().unwrap();
        assert_eq!(options(0), ["rbind", "rslave", "rw"]);
        assert_eq!(options(1), ["rbind", "rprivate"]);
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.rootfs_propagation().is_none());
    }
}
