//! `mounts` of a container's spec: the standard ones, the pod's files, and the request's, in an order that nests.

use super::{ConvertError, Source};
use boxlite_proto::cri::v1::{LinuxContainerSecurityContext, Mount, MountPropagation};
use serde_json::{Value, json};
use std::path::{Component, Path, PathBuf};

/// The pod's /dev/shm, shared by its containers. A path of the guest: the shim binds nothing of the host for this destination.
const SHM: &str = "/dev/shm";

/// The whole list. A request's mount at the same place takes the place of a standard one.
pub fn mounts(
    source: &Source<'_>,
    security: &LinuxContainerSecurityContext,
) -> Result<Vec<Value>, ConvertError> {
    let access = if security.privileged { "rw" } else { "ro" };
    let flat = |target: &str, kind: &str, origin: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": origin, "options": options});
    let mut list = vec![
        flat("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        flat(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        flat(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        flat(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        ),
        flat(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", access],
        ),
        flat(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        ),
        flat(SHM, "bind", SHM, &["rbind", "rprivate", "rw"]),
    ];
    let file_access = if security.readonly_rootfs { "ro" } else { "rw" };
    for (target, name) in [
        ("/etc/hostname", "hostname"),
        ("/etc/hosts", "hosts"),
        ("/etc/resolv.conf", "resolv.conf"),
    ] {
        list.push(json!({
            "destination": target,
            "type": "bind",
            "source": source.files.join(name),
            "options": ["rbind", "rprivate", file_access],
        }));
    }
    let mut wanted = Vec::new();
    for mount in &source.config.mounts {
        wanted.push((target(mount)?, volume(mount)?));
    }
    let covered = |entry: &Value| {
        let at = entry["destination"].as_str().unwrap_or_default();
        wanted.iter().any(|(target, _)| target == Path::new(at))
    };
    list.retain(|entry| !covered(entry));
    // A mount below another must come after it; the sort is stable, so equals keep the request's order.
    wanted.sort_by_key(|(target, _)| target.components().count());
    list.extend(wanted.into_iter().map(|(_, mount)| mount));
    Ok(list)
}

/// Where in the container, cleaned: absolute, no `..`, not the root.
fn target(mount: &Mount) -> Result<PathBuf, ConvertError> {
    let path = &mount.container_path;
    let fail = |reason: &str| ConvertError::invalid("mount.container_path", path.clone(), reason);
    if path.is_empty() {
        return Err(ConvertError::Missing("mount.container_path"));
    }
    if path.contains('\0') {
        return Err(fail("has a NUL"));
    }
    let mut clean = PathBuf::from("/");
    for part in Path::new(path).components() {
        match part {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => clean.push(name),
            Component::ParentDir | Component::Prefix(_) => return Err(fail("must not contain ..")),
        }
    }
    if clean == Path::new("/") {
        return Err(fail("must not be the root"));
    }
    Ok(clean)
}

fn volume(mount: &Mount) -> Result<Value, ConvertError> {
    if mount
        .image
        .as_ref()
        .is_some_and(|image| !image.image.is_empty())
        || !mount.image_sub_path.is_empty()
    {
        return Err(ConvertError::unsupported(
            "mount.image",
            format!("{:?}", mount.container_path),
            "image volumes are not there yet",
        ));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(ConvertError::unsupported(
            "mount.uidMappings",
            format!("{:?}", mount.container_path),
            "id-mapped mounts are not there yet",
        ));
    }
    if mount.recursive_read_only {
        // The handlers' features say so too, so a kubelet does not ask.
        return Err(ConvertError::unsupported(
            "mount.recursive_read_only",
            format!("{:?}", mount.container_path),
            "recursive read-only mounts are not there yet",
        ));
    }
    let origin = host_path(mount)?;
    // Mounts that come on the host later do not reach the guest: rslave is what the guest can give of HostToContainer.
    let propagation = if mount.propagation == MountPropagation::PropagationHostToContainer as i32 {
        tracing::warn!(
            path = mount.container_path,
            "HostToContainer: later mounts of the host will not be seen"
        );
        "rslave"
    } else {
        "rprivate"
    };
    let access = if mount.readonly { "ro" } else { "rw" };
    Ok(json!({
        "destination": target(mount)?,
        "type": "bind",
        "source": origin,
        "options": ["rbind", propagation, access],
    }))
}

/// The mount's source with its symbolic links resolved: what is mounted is what was looked at.
fn host_path(mount: &Mount) -> Result<PathBuf, ConvertError> {
    let fail = |reason: String| ConvertError::HostPath {
        host_path: mount.host_path.clone(),
        container_path: mount.container_path.clone(),
        reason,
    };
    if !mount.host_path.starts_with('/') {
        return Err(fail("must be an absolute path".into()));
    }
    std::fs::canonicalize(&mount.host_path).map_err(|error| fail(error.to_string()))
}
