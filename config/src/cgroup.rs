//! Names of a pod's cgroup under both cgroup drivers, and the memory limit that the host has set on it.

use std::path::{Component, Path};

/// Mount point of the cgroup file systems.
pub const CGROUP_MOUNT: &str = "/sys/fs/cgroup";
/// Limits from this value on mean unlimited: cgroup v2's `max` and v1's largest multiple of a page.
pub const UNLIMITED_BYTES: u64 = 1 << 60;

/// Expands a systemd slice to its directory: `a-b-c.slice` is `/a.slice/a-b.slice/a-b-c.slice`. Any other name is
/// returned unchanged.
pub fn expand_slice(name: &str) -> String {
    let last = name.rsplit('/').next().unwrap_or_default();
    let Some(stem) = last
        .strip_suffix(".slice")
        .filter(|_| !name.trim_start_matches('/').contains('/'))
    else {
        return name.to_owned();
    };
    let ends = stem
        .match_indices('-')
        .map(|(at, _)| at)
        .chain([stem.len()]);
    ends.map(|end| format!("/{}.slice", &stem[..end])).collect()
}

/// Returns the cgroup above the one that an OCI spec names: cgroupfs's `/kubepods/podX/<id>` or systemd's
/// `podX.slice:cri-containerd:<id>`. Empty for the root and for relative names.
pub fn parent(cgroups_path: &Path) -> String {
    let text = cgroups_path.to_string_lossy();
    if let Some((slice, _)) = text.split_once(".slice:") {
        return expand_slice(&format!("{slice}.slice"));
    }
    let plain = cgroups_path.is_absolute()
        && cgroups_path
            .components()
            .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    match cgroups_path.parent() {
        Some(parent) if plain && parent != Path::new("/") => parent.display().to_string(),
        _ => String::new(),
    }
}

/// Returns the memory limit in bytes of the cgroup `name` below `mount`, v2 or v1. `None` if there is no such cgroup or no
/// limit, or the name leaves the tree.
pub fn memory_limit(mount: &Path, name: &str) -> Option<u64> {
    limit(mount, name, "memory.max", "memory/memory.limit_in_bytes")
        .filter(|limit| *limit < UNLIMITED_BYTES)
}

/// Returns the maximum number of processes of the cgroup `name` below `mount`, as [`memory_limit`]. A kubelet sets it to its
/// podPidsLimit.
pub fn pids_limit(mount: &Path, name: &str) -> Option<u64> {
    limit(mount, name, "pids.max", "pids/pids.max")
}

/// Reads `<name>/<v2>` or the v1 file, given as `<controller>/<file>`; `None` if it holds no number.
fn limit(mount: &Path, name: &str, v2: &str, v1: &str) -> Option<u64> {
    let name = name.trim_start_matches('/');
    if name.is_empty() || name.split('/').any(|part| part == "..") {
        return None;
    }
    let (controller, file) = v1.split_once('/')?;
    let text = std::fs::read_to_string(mount.join(name).join(v2))
        .or_else(|_| std::fs::read_to_string(mount.join(controller).join(name).join(file)))
        .ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parent_of_slices_and_paths_is_a_directory() {
        let parent = |text: &str| parent(Path::new(text));
        assert_eq!(
            parent("kubepods-besteffort-podX.slice:cri-containerd:abc"),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podX.slice"
        );
        assert_eq!(
            parent("/kubepods/besteffort/podX/abc"),
            "/kubepods/besteffort/podX"
        );
        assert_eq!(parent("/default/../x"), "");
        assert_eq!(parent("abc"), "");
        assert_eq!(expand_slice("/kubepods/podX"), "/kubepods/podX");
        let expanded = "/kubepods.slice/kubepods-podX.slice";
        assert_eq!(expand_slice(expanded), expanded);
    }

    #[test]
    fn memory_limit_is_read_from_v1_and_v2() {
        let dir = tempfile::tempdir().unwrap();
        let v1 = dir.path().join("memory/kubepods/a");
        let v2 = dir.path().join("kubepods/b");
        std::fs::create_dir_all(&v1).unwrap();
        std::fs::create_dir_all(&v2).unwrap();
        std::fs::write(v1.join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        std::fs::write(v2.join("memory.max"), "max\n").unwrap();
        assert_eq!(memory_limit(dir.path(), "/kubepods/a"), None);
        assert_eq!(memory_limit(dir.path(), "/kubepods/b"), None);
        std::fs::write(v1.join("memory.limit_in_bytes"), "1048576\n").unwrap();
        std::fs::write(v2.join("memory.max"), "2097152\n").unwrap();
        assert_eq!(memory_limit(dir.path(), "/kubepods/a"), Some(1 << 20));
        assert_eq!(memory_limit(dir.path(), "kubepods/b"), Some(2 << 20));
        assert_eq!(memory_limit(dir.path(), "../kubepods/b"), None);
        assert_eq!(memory_limit(dir.path(), ""), None);
    }

    #[test]
    fn pids_limit_is_read_from_v1_and_v2() {
        let dir = tempfile::tempdir().unwrap();
        let v1 = dir.path().join("pids/kubepods/a");
        let v2 = dir.path().join("kubepods/b");
        std::fs::create_dir_all(&v1).unwrap();
        std::fs::create_dir_all(&v2).unwrap();
        std::fs::write(v1.join("pids.max"), "1024\n").unwrap();
        std::fs::write(v2.join("pids.max"), "max\n").unwrap();
        assert_eq!(pids_limit(dir.path(), "/kubepods/a"), Some(1024));
        assert_eq!(pids_limit(dir.path(), "/kubepods/b"), None);
        std::fs::write(v2.join("pids.max"), "77\n").unwrap();
        assert_eq!(pids_limit(dir.path(), "/kubepods/b"), Some(77));
        assert_eq!(pids_limit(dir.path(), ""), None);
    }
}
