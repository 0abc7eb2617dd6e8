//! Mount propagation of a volume, as an option of the spec.
//!
//! Reads the mount table of this process, which is the host's, for Bidirectional only. The propagation itself is
//! implemented in the shim.

use super::ConvertError;
use boxlite_proto::cri::v1::{Mount, MountPropagation};
use boxlite_sys::mountinfo;
use std::path::{Path, PathBuf};

const TABLE: &str = "/proc/self/mountinfo";

/// Returns the propagation option. With recursive read-only the CRI permits only private propagation, because later
/// mounts could be writable. `source` is the host path with its links resolved.
pub(super) fn option(mount: &Mount, source: &Path) -> Result<&'static str, ConvertError> {
    let private = mount.propagation == MountPropagation::PropagationPrivate as i32;
    if mount.recursive_read_only && !(private && mount.readonly) {
        return Err(ConvertError::invalid(
            "mount.recursive_read_only",
            mount.container_path.clone(),
            "requires readonly and propagation PRIVATE",
        ));
    }
    if private {
        return Ok("rprivate");
    }
    if mount.propagation == MountPropagation::PropagationHostToContainer as i32 {
        return Ok("rslave");
    }
    if mount.propagation != MountPropagation::PropagationBidirectional as i32 {
        return Err(ConvertError::invalid(
            "mount.propagation",
            mount.propagation.to_string(),
            "unknown propagation",
        ));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(ConvertError::unsupported(
            "mount.propagation",
            format!("Bidirectional ({:?})", mount.container_path),
            "a pod with a user namespace cannot propagate mounts to the host",
        ));
    }
    let fail = |reason: String| ConvertError::HostPath {
        host_path: mount.host_path.clone(),
        container_path: mount.container_path.clone(),
        reason,
    };
    let table = std::fs::read_to_string(TABLE).map_err(|error| fail(error.to_string()))?;
    match unshared(&table, source) {
        None => Ok("rshared"),
        Some(point) => Err(fail(format!(
            "path {} is mounted on {} but it is not a shared mount, which propagation Bidirectional needs",
            source.display(),
            point.display()
        ))),
    }
}

/// Returns the mount point of the mount that contains `path`, if that mount is not shared.
fn unshared(table: &str, path: &Path) -> Option<PathBuf> {
    let mut best: Option<(PathBuf, bool)> = None;
    for mount in mountinfo::mounts(table) {
        let depth = |path: &Path| path.components().count();
        // A later mount at the same point covers an earlier one.
        let deeper = best
            .as_ref()
            .is_none_or(|(known, _)| depth(&mount.point) >= depth(known));
        if path.starts_with(&mount.point) && deeper {
            let shared = mount.is_shared();
            best = Some((mount.point, shared));
        }
    }
    best.filter(|(_, shared)| !shared).map(|(point, _)| point)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unshared_returns_the_containing_mount() {
        let table = r"
1 0 0:1 / / rw shared:1 - ext4 /dev/vda rw
2 1 0:2 / /private rw - tmpfs tmpfs rw
3 2 0:3 / /private/a\040b rw shared:7 master:1 - tmpfs tmpfs rw
4 1 0:4 / /slave rw master:3 - tmpfs tmpfs rw
5 1 0:5 / /twice rw shared:8 - tmpfs tmpfs rw
6 5 0:6 / /twice rw - tmpfs tmpfs rw";
        for (path, expected) in [
            ("/var/x", None),
            ("/privately", None),
            ("/private", Some("/private")),
            ("/private/x", Some("/private")),
            ("/private/a b/c", None),
            ("/slave/x", Some("/slave")),
            ("/twice", Some("/twice")),
        ] {
            let found = unshared(table, Path::new(path));
            assert_eq!(found, expected.map(PathBuf::from), "{path}");
        }
    }

    #[test]
    fn errors_name_the_field() {
        let both = Mount {
            container_path: "/data".into(),
            host_path: "/tmp".into(),
            propagation: MountPropagation::PropagationBidirectional.into(),
            ..Default::default()
        };
        let mapped = Mount {
            uid_mappings: vec![Default::default()],
            ..both.clone()
        };
        let error = option(&mapped, Path::new("/tmp")).unwrap_err().to_string();
        assert!(
            error.contains("Bidirectional") && error.contains("user namespace"),
            "{error}"
        );
        let unknown = Mount {
            propagation: 9,
            ..both
        };
        let error = option(&unknown, Path::new("/tmp")).unwrap_err().to_string();
        assert!(error.contains("mount.propagation"), "{error}");
    }
}
