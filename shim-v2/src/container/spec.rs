//! Rewrites a container's OCI spec for the guest: host paths become guest paths, host-only settings are removed.
//!
//! Pure except for inspecting mount sources, in [`super::volume`]. [`super::create`] binds the sources into the share; the
//! guest creates namespaces, cgroups and devices from the spec.

use super::volume::{self, Bind};
use crate::blocks::request::{self, DeviceRequest};
use crate::error::{Result, ShimError};
use boxlite_proto::boxlite::v1::PidMode;
use boxlite_proto::names::{PID_MODE_ANNOTATION, STDIN_ANNOTATION};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use std::path::Path;

/// Maximum size of config.json.
const MAX_SPEC_BYTES: u64 = 4 << 20;

/// A spec for the guest with the host resources that it needs.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// Spec to send to the guest.
    pub spec: Spec,
    /// Host paths to bind into the share, in the order of the mounts.
    pub binds: Vec<Bind>,
    /// Block devices of the host.
    pub blocks: Vec<DeviceRequest>,
    /// PID namespace of the container.
    pub pid_mode: PidMode,
    /// Target container id for [`PidMode::Target`].
    pub pid_target: String,
    /// Keep stdin open.
    pub stdin: bool,
    /// Close stdin after the first writer.
    pub stdin_once: bool,
    /// Read-only root file system.
    pub read_only: bool,
}

/// Reads `config.json` of a bundle.
///
/// # Errors
/// Io or Invalid with the file's path.
pub fn load(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        if std::fs::metadata(path)?.len() > MAX_SPEC_BYTES {
            return Err(std::io::Error::new(
                std::io::ErrorKind::FileTooLarge,
                format!("larger than {MAX_SPEC_BYTES} bytes"),
            ));
        }
        std::fs::read(path)
    };
    let bytes = read(&path).map_err(ShimError::io("read", path.display()))?;
    serde_json::from_slice(&bytes).map_err(|error| ShimError::Invalid {
        field: "config.json",
        reason: error.to_string(),
    })
}

/// Rewrites `spec` for the guest.
///
/// # Errors
/// HostPath with the source and destination of a mount; Invalid for devices.
pub fn rewrite(mut spec: Spec) -> Result<GuestSpec> {
    let annotation = |name: &str| {
        let all = spec.annotations().as_ref()?;
        all.get(name).cloned()
    };
    let (pid_mode, pid_target) = pid_mode(&spec, annotation(PID_MODE_ANNOTATION).as_deref())?;
    let stdin = annotation(STDIN_ANNOTATION);
    let read_only = spec
        .root()
        .as_ref()
        .and_then(|root| root.readonly())
        .unwrap_or(false);

    let mut binds = Vec::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in mounts.iter_mut() {
        binds.extend(volume::rewrite(mount)?);
    }
    spec.set_mounts(Some(mounts));
    let blocks = request::take(&mut spec)?;
    drop_host_settings(&mut spec);
    Ok(GuestSpec {
        spec,
        binds,
        blocks,
        pid_mode,
        pid_target,
        stdin: stdin.is_some(),
        stdin_once: stdin.as_deref() == Some("once"),
        read_only,
    })
}

fn pid_mode(spec: &Spec, requested: Option<&str>) -> Result<(PidMode, String)> {
    match requested {
        Some("container") => return Ok((PidMode::Container, String::new())),
        Some("pod") => return Ok((PidMode::Pod, String::new())),
        Some("node") => return Ok((PidMode::Node, String::new())),
        Some(other) => {
            let target = other.strip_prefix("target:").filter(|id| !id.is_empty());
            return match target {
                Some(id) => Ok((PidMode::Target, id.to_owned())),
                None => Err(ShimError::Invalid {
                    field: PID_MODE_ANNOTATION,
                    reason: format!("{other:?} must be container, pod, node or target:<id>"),
                }),
            };
        }
        None => {}
    }
    let own = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref())
        .and_then(|all| {
            all.iter()
                .find(|namespace| namespace.typ() == LinuxNamespaceType::Pid)
        })
        .is_some_and(|namespace| namespace.path().is_none());
    Ok((
        if own {
            PidMode::Container
        } else {
            PidMode::Pod
        },
        String::new(),
    ))
}

/// Returns the source of a bind mount; None for other mounts.
pub fn bind_source(mount: &Mount) -> Option<&Path> {
    let options = mount.options().as_deref().unwrap_or_default();
    let is = |name: &str| options.iter().any(|option| option == name);
    let bind = mount.typ().as_deref() == Some("bind") || is("bind") || is("rbind");
    mount.source().as_deref().filter(|_| bind)
}

/// Removes settings that refer to the host: hooks, namespace paths, the network namespace, cgroup paths, labels. Removes the
/// root's propagation too, since containerd uses values that libcontainer rejects; volumes have their own propagation.
fn drop_host_settings(spec: &mut Spec) {
    spec.set_hooks(None);
    if let Some(mut process) = spec.process().clone() {
        process.set_apparmor_profile(None).set_selinux_label(None);
        spec.set_process(Some(process));
    }
    let Some(mut linux) = spec.linux().clone() else {
        return;
    };
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    let kept = namespaces
        .into_iter()
        .filter(|namespace| {
            // Network, IPC and UTS namespaces are those of the VM. The guest creates a user namespace from the mappings.
            matches!(
                namespace.typ(),
                LinuxNamespaceType::Mount
                    | LinuxNamespaceType::Pid
                    | LinuxNamespaceType::Cgroup
                    | LinuxNamespaceType::User
            )
        })
        .map(|mut namespace| {
            namespace.set_path(None);
            namespace
        })
        .collect();
    linux
        .set_namespaces(Some(kept))
        .set_cgroups_path(None)
        .set_rootfs_propagation(None)
        .set_mount_label(None);
    spec.set_linux(Some(linux));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::{Access, BindMode};
    use serde_json::json;

    fn spec(value: serde_json::Value) -> Spec {
        serde_json::from_value(value).expect("a spec")
    }

    fn bind(source: &Path, destination: &str) -> serde_json::Value {
        json!({"ociVersion": "1.1.0", "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]},
        ]})
    }

    #[test]
    fn rewrite_bind_mount_points_into_the_share() {
        let dir = tempfile::tempdir().expect("tempdir");
        let real = std::fs::canonicalize(dir.path()).expect("exists");
        let out = rewrite(spec(bind(dir.path(), "/data"))).expect("rewritten");
        let [volume] = out.binds.as_slice() else {
            panic!("one bind: {:?}", out.binds)
        };
        assert_eq!(
            (&volume.source, volume.mode),
            (&real, BindMode::fixed(Access::ReadOnly))
        );
        assert!(volume.path.starts_with("m/"), "{}", volume.path);
        let mounts = out.spec.mounts().clone().expect("mounts");
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        let inside = Path::new("/run/boxlite/share").join(&volume.path);
        assert_eq!(mounts[1].source().as_deref(), Some(inside.as_path()));
        let again = rewrite(spec(bind(dir.path(), "/other"))).expect("rewritten");
        assert_eq!(
            again.binds, out.binds,
            "two containers share one path for the volume"
        );
    }

    #[test]
    fn rewrite_missing_source_names_path_and_mount() {
        let error = rewrite(spec(bind(Path::new("/no/such/path"), "/data"))).expect_err("refused");
        let text = error.to_string();
        assert!(
            text.contains("/no/such/path") && text.contains("/data"),
            "{text}"
        );
    }

    #[test]
    fn rewrite_refuses_sockets_and_devices_keeps_guest_shm() {
        let dir = tempfile::tempdir().expect("tempdir");
        let socket = dir.path().join("s");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("binds");
        for (path, word) in [
            (socket.as_path(), "socket"),
            (Path::new("/dev/null"), "device"),
        ] {
            let error = rewrite(spec(bind(path, "/x"))).expect_err("refused");
            assert!(error.to_string().contains(word), "{error}");
        }
        let out = rewrite(spec(bind(Path::new("/no/such"), "/dev/shm"))).expect("the guest's own");
        assert!(out.binds.is_empty());
    }

    #[test]
    fn rewrite_removes_host_settings() {
        let out = rewrite(
            spec(json!({
                "ociVersion": "1.1.0",
                "root": {"path": "rootfs", "readonly": true},
                "hooks": {"prestart": [{"path": "/bin/true"}]},
                "annotations": {"io.boxlite.pid-mode": "target:c0", "io.boxlite.stdin": "once"},
                "linux": {
                    "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
                    "cgroupsPath": "/kubepods/x",
                    "rootfsPropagation": "rslave",
                    "namespaces": [
                        {"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "network", "path": "/run/netns/x"},
                        {"type": "mount"}, {"type": "uts"}, {"type": "user", "path": "/proc/7/ns/user"},
                    ],
                },
            })),
        )
        .expect("rewritten");
        assert_eq!(
            (out.pid_mode, out.pid_target.as_str()),
            (PidMode::Target, "c0")
        );
        assert!(out.stdin && out.stdin_once && out.read_only);
        assert!(out.spec.hooks().is_none());
        let linux = out.spec.linux().clone().expect("linux");
        assert!(linux.cgroups_path().is_none() && linux.rootfs_propagation().is_none());
        assert_eq!(linux.uid_mappings().as_ref().map(Vec::len), Some(1));
        let kept: Vec<_> = linux
            .namespaces()
            .clone()
            .expect("some")
            .iter()
            .map(|n| (n.typ(), n.path().is_none()))
            .collect();
        assert_eq!(
            kept,
            [
                (LinuxNamespaceType::Pid, true),
                (LinuxNamespaceType::Mount, true),
                (LinuxNamespaceType::User, true)
            ]
        );
    }
}
