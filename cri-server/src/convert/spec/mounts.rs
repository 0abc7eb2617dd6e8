//! `mounts` of a container's spec: the standard mounts, the pod's files, and the mounts of the request, sorted by
//! nesting.

use super::{ConvertError, Source, image_volumes, propagation};
use crate::layout::{HOSTNAME, HOSTS, RESOLV_CONF};
use boxlite_proto::cri::v1::{
    IdMapping, ImageSpec, LinuxContainerSecurityContext, Mount, NamespaceMode,
};
use boxlite_proto::names::{IMAGE_MOUNT, MOUNT_FLAGS, SUB_PATH_OPTION};
use serde_json::{Value, json};
use std::path::{Component, Path, PathBuf};

/// The pod's /dev/shm, shared by its containers. The path is in the guest: the shim binds nothing of the host for
/// this destination.
const SHM: &str = "/dev/shm";

/// Lists of System V IPC objects.
const SYSVIPC: &str = "/proc/sysvipc";

/// Returns the list of mounts. A mount of the request replaces a standard mount with the same destination; a `VOLUME` of
/// the image replaces neither.
pub(crate) fn mounts(
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
    let options = security.namespace_options.as_ref();
    if options.is_some_and(|options| options.ipc == NamespaceMode::Node as i32) {
        // A VM has a separate IPC namespace; the container gets a list of the node's objects (docs/security.md). The
        // shim knows this source.
        list.push(flat(SYSVIPC, "bind", SYSVIPC, &["rbind", "rprivate", "ro"]));
    }
    let file_access = if security.readonly_rootfs { "ro" } else { "rw" };
    for (target, name) in [
        ("/etc/hostname", HOSTNAME),
        ("/etc/hosts", HOSTS),
        ("/etc/resolv.conf", RESOLV_CONF),
    ] {
        if name == RESOLV_CONF && source.sandbox.passt && source.sandbox.resolv_conf().is_none() {
            continue;
        }
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
    let standard = |path: &Path| {
        let mut destinations = list
            .iter()
            .filter_map(|entry| entry["destination"].as_str());
        destinations.any(|destination| Path::new(destination) == path)
    };
    for path in image_volumes::paths(source.image_config().volumes().as_deref())? {
        let requested = wanted.iter().any(|(target, _)| *target == path);
        if !requested && !standard(&path) {
            wanted.push((path.clone(), image_volumes::mount(&path)));
        }
    }
    // A nested mount must come after its parent; the sort is stable, so equal depths keep the order of the request.
    wanted.sort_by_key(|(target, _)| target.components().count());
    list.extend(wanted.into_iter().map(|(_, mount)| mount));
    Ok(list)
}

/// Returns the normalized destination: absolute, without `..`, not the root.
fn target(mount: &Mount) -> Result<PathBuf, ConvertError> {
    let path = &mount.container_path;
    let fail = |reason: &str| ConvertError::invalid("mount.container_path", path.clone(), reason);
    if path.is_empty() {
        return Err(ConvertError::Missing("mount.container_path"));
    }
    if path.contains('\0') {
        return Err(fail("contains a NUL"));
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
    if let Some(image) = image_source(mount) {
        return image_volume(mount, &image.image_ref);
    }
    // A kubelet sets image_sub_path on every mount of a pod that has an image volume; it applies to image volumes only.
    let source = host_path(mount)?;
    let propagation = propagation::option(mount, &source)?;
    let access = match (mount.readonly, mount.recursive_read_only) {
        (true, true) => "rro",
        (true, false) => "ro",
        (false, _) => "rw",
    };
    let mut options = vec!["rbind", propagation, access];
    options.extend(mount_flags(mount)?);
    let mut volume = json!({
        "destination": target(mount)?,
        "type": "bind",
        "source": source,
        "options": options,
    });
    // For a pod with a user namespace; the shim maps the owners.
    for (key, mappings) in [
        ("uidMappings", &mount.uid_mappings),
        ("gidMappings", &mount.gid_mappings),
    ] {
        if !mappings.is_empty() {
            volume[key] = mappings.iter().map(id_mapping).collect();
        }
    }
    Ok(volume)
}

/// Returns the additional mount options. Ignoring an unknown one could weaken the isolation.
fn mount_flags(mount: &Mount) -> Result<Vec<&'static str>, ConvertError> {
    let find = |option: &String| {
        MOUNT_FLAGS
            .into_iter()
            .find(|flag| flag == option)
            .ok_or_else(|| {
                ConvertError::unsupported(
                    "mount.mount_options",
                    format!("{option:?}"),
                    "must be nosuid, nodev or noexec",
                )
            })
    };
    mount.mount_options.iter().map(find).collect()
}

fn id_mapping(mapping: &IdMapping) -> Value {
    json!({"containerID": mapping.container_id, "hostID": mapping.host_id, "size": mapping.length})
}

/// Returns the image of an image mount; `None` for a host path.
pub(crate) fn image_source(mount: &Mount) -> Option<&ImageSpec> {
    mount.image.as_ref().filter(|image| !image.image.is_empty())
}

/// Returns an image mount. The runtime adds its layers to the options.
fn image_volume(mount: &Mount, image_id: &str) -> Result<Value, ConvertError> {
    if !mount.host_path.is_empty() {
        return Err(ConvertError::invalid(
            "mount.host_path",
            mount.host_path.clone(),
            "must be empty if mount.image is set",
        ));
    }
    if !mount.readonly {
        return Err(ConvertError::invalid(
            "mount.readonly",
            "false",
            "image volumes are read-only",
        ));
    }
    let sub = &mount.image_sub_path;
    let plain = Path::new(sub)
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain || sub.contains('\0') {
        return Err(ConvertError::invalid(
            "mount.image_sub_path",
            sub.clone(),
            "must be a relative path without ..",
        ));
    }
    let mut options = vec!["ro".to_owned()];
    options.extend(mount_flags(mount)?.into_iter().map(str::to_owned));
    if !sub.is_empty() {
        options.push(format!("{SUB_PATH_OPTION}{sub}"));
    }
    Ok(json!({
        "destination": target(mount)?,
        "type": IMAGE_MOUNT,
        "source": image_id,
        "options": options,
    }))
}

/// Returns the mount source with its symbolic links resolved, so that the mounted path is the validated one.
fn host_path(mount: &Mount) -> Result<PathBuf, ConvertError> {
    let fail = |reason: String| ConvertError::HostPath {
        host_path: mount.host_path.clone(),
        container_path: mount.container_path.clone(),
        reason,
    };
    if !mount.host_path.starts_with('/') {
        return Err(ConvertError::invalid(
            "config.mounts.host_path",
            &mount.host_path,
            "must be an absolute path",
        ));
    }
    // As containerd and CRI-O do: a hostPath volume without a type may name a path that does not exist yet.
    match std::fs::metadata(&mount.host_path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // Creating a directory there would fail with "File exists".
            if std::fs::symlink_metadata(&mount.host_path).is_ok() {
                return Err(fail("symbolic link to a path that does not exist".into()));
            }
            std::fs::create_dir_all(&mount.host_path)
                .map_err(|error| fail(format!("failed to create directory: {error}")))?;
        }
        _ => {}
    }
    std::fs::canonicalize(&mount.host_path).map_err(|error| fail(error.to_string()))
}
