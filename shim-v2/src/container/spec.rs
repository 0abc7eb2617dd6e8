//! The OCI spec of a container as the guest gets it: host paths become guest paths, what belongs to the host goes.
//!
//! Pure, apart from looking at mount sources. Binding them into the share is [`super::create`]'s; building namespaces,
//! cgroups and devices out of the spec is the guest's.

use crate::error::{Result, ShimError};
use boxlite_proto::boxlite::v1::PidMode;
use boxlite_proto::names::{GUEST_SHARE, PID_MODE_ANNOTATION, STDIN_ANNOTATION};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use sha2::{Digest, Sha256};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Largest config.json accepted, in bytes.
const SPEC_LIMIT: u64 = 4 << 20;
/// The pod's shared memory: the guest's own, whatever the host has there.
const SHM: &str = "/dev/shm";

/// A host path that must appear in the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host, symbolic links resolved.
    pub source: PathBuf,
    /// Below the share.
    pub path: String,
    /// Whether the guest must not write; the spec's mount says it too.
    pub read_only: bool,
}

/// A spec for the guest with what it needs.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// As the guest gets it.
    pub spec: Spec,
    /// What to bind, in order of the mounts.
    pub binds: Vec<Bind>,
    /// Whose PID namespace.
    pub pid_mode: PidMode,
    /// Container id, with [`PidMode::Target`].
    pub pid_target: String,
    /// Keep an input open.
    pub stdin: bool,
    /// Close it after its first writer.
    pub stdin_once: bool,
    /// Root file system not writable.
    pub read_only: bool,
}

/// Reads `config.json` of a bundle.
///
/// # Errors
/// Io or Invalid, naming the file.
pub fn load(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let read = |path: &Path| -> std::io::Result<Vec<u8>> {
        if std::fs::metadata(path)?.len() > SPEC_LIMIT {
            return Err(std::io::Error::new(
                std::io::ErrorKind::FileTooLarge,
                format!("more than {SPEC_LIMIT} bytes"),
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
/// HostPath, naming the path and the mount that wants it.
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
        if let Some(bind) = bind_of(mount)? {
            mount.set_source(Some(Path::new(GUEST_SHARE).join(&bind.path)));
            binds.push(bind);
        }
    }
    spec.set_mounts(Some(mounts));
    drop_host(&mut spec);
    Ok(GuestSpec {
        spec,
        binds,
        pid_mode,
        pid_target,
        stdin: stdin.is_some(),
        stdin_once: stdin.as_deref() == Some("once"),
        read_only,
    })
}

fn pid_mode(spec: &Spec, wanted: Option<&str>) -> Result<(PidMode, String)> {
    match wanted {
        Some("container") => return Ok((PidMode::Container, String::new())),
        Some("pod") => return Ok((PidMode::Pod, String::new())),
        Some(other) => {
            let target = other.strip_prefix("target:").filter(|id| !id.is_empty());
            return match target {
                Some(id) => Ok((PidMode::Target, id.to_owned())),
                None => Err(ShimError::Invalid {
                    field: PID_MODE_ANNOTATION,
                    reason: format!("{other:?} is none of container, pod, target:<id>"),
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

/// What a mount needs of the host. None: it is the guest's own affair.
fn bind_of(mount: &Mount) -> Result<Option<Bind>> {
    let options = mount.options().as_deref().unwrap_or_default();
    let is = |name: &str| options.iter().any(|option| option == name);
    let bind = mount.typ().as_deref() == Some("bind") || is("bind") || is("rbind");
    if !bind || mount.destination() == Path::new(SHM) {
        return Ok(None);
    }
    let wanted = mount.source().clone().unwrap_or_default();
    let refuse = |reason: String| ShimError::HostPath {
        path: wanted.clone(),
        wanted_for: format!("mount {}", mount.destination().display()),
        reason,
    };
    if !wanted.is_absolute() {
        return Err(refuse("not absolute".to_owned()));
    }
    let source = std::fs::canonicalize(&wanted).map_err(|error| refuse(error.to_string()))?;
    let metadata = std::fs::metadata(&source).map_err(|error| refuse(error.to_string()))?;
    let kind = metadata.file_type();
    if !kind.is_dir() && !kind.is_file() {
        let what = match () {
            () if kind.is_socket() => "a socket",
            () if kind.is_fifo() => "a FIFO",
            () if kind.is_char_device() || kind.is_block_device() => "a device",
            () => "neither a file nor a directory",
        };
        return Err(refuse(format!(
            "it is {what}, and only files and directories reach into a VM"
        )));
    }
    let read_only = is("ro");
    Ok(Some(Bind {
        path: volume_path(&source, &metadata, read_only),
        source,
        read_only,
    }))
}

/// Where a volume appears in the share: one place for one inode, however many containers mount it. Two places would be two
/// inodes to the guest, and its caches would show one container's changes to the other a second late.
fn volume_path(source: &Path, metadata: &std::fs::Metadata, read_only: bool) -> String {
    let mut hash = Sha256::new();
    // The inode too: a volume that was made anew under its old path is another one.
    for number in [metadata.dev(), metadata.ino(), u64::from(read_only)] {
        hash.update(number.to_le_bytes());
    }
    hash.update(source.as_os_str().as_encoded_bytes());
    format!("m/{}", hex::encode(hash.finalize()))
}

/// Takes out what names things of the host: hooks, namespace paths, the network namespace, cgroup paths, labels.
fn drop_host(spec: &mut Spec) {
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
            // The pod's network, IPC and UTS are the VM's own; a user namespace of the host means nothing in it.
            matches!(
                namespace.typ(),
                LinuxNamespaceType::Mount | LinuxNamespaceType::Pid | LinuxNamespaceType::Cgroup
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
        .set_mount_label(None)
        .set_uid_mappings(None)
        .set_gid_mappings(None);
    spec.set_linux(Some(linux));
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn a_bind_mount_goes_through_the_share() {
        let dir = tempfile::tempdir().expect("tempdir");
        let real = std::fs::canonicalize(dir.path()).expect("exists");
        let out = rewrite(spec(bind(dir.path(), "/data"))).expect("rewritten");
        let [volume] = out.binds.as_slice() else {
            panic!("one bind: {:?}", out.binds)
        };
        assert_eq!((&volume.source, volume.read_only), (&real, true));
        assert!(volume.path.starts_with("m/"), "{}", volume.path);
        let mounts = out.spec.mounts().clone().expect("mounts");
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        let inside = Path::new("/run/boxlite/share").join(&volume.path);
        assert_eq!(mounts[1].source().as_deref(), Some(inside.as_path()));
        let again = rewrite(spec(bind(dir.path(), "/other"))).expect("rewritten");
        assert_eq!(
            again.binds, out.binds,
            "two containers, one place of the volume"
        );
    }

    #[test]
    fn a_missing_path_is_named_with_its_mount() {
        let error = rewrite(spec(bind(Path::new("/no/such/path"), "/data"))).expect_err("refused");
        let text = error.to_string();
        assert!(
            text.contains("/no/such/path") && text.contains("/data"),
            "{text}"
        );
    }

    #[test]
    fn sockets_and_devices_are_refused_and_shared_memory_is_the_guests() {
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
    fn what_is_the_hosts_goes() {
        let out = rewrite(
            spec(json!({
                "ociVersion": "1.1.0",
                "root": {"path": "rootfs", "readonly": true},
                "hooks": {"prestart": [{"path": "/bin/true"}]},
                "annotations": {"io.boxlite.pid-mode": "target:c0", "io.boxlite.stdin": "once"},
                "linux": {
                    "cgroupsPath": "/kubepods/x",
                    "namespaces": [
                        {"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "network", "path": "/run/netns/x"},
                        {"type": "mount"}, {"type": "uts"},
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
        assert!(linux.cgroups_path().is_none());
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
                (LinuxNamespaceType::Mount, true)
            ]
        );
    }
}
