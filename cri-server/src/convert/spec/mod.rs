//! The OCI spec of a container, as containerd's CRI plugin would write it, but for what a VM makes different.
//!
//! Differences: network, IPC and UTS namespaces are the VM's own, so the spec asks for none; `process.user` may carry a name that only the
//! guest can resolve (see `user`); `/dev/shm` is the guest's; AppArmor, SELinux and seccomp are the host kernel's affair and the guest's
//! kernel is the pod's own. Mount sources are host paths; the runtime turns them into guest paths.
//!
//! Written as JSON, since that is what the specification defines, and read back typed: what oci-spec does not know fails here.

mod capabilities;
mod mounts;
mod process;
mod resources;
#[cfg(test)]
mod tests;
mod user;

pub use mounts::wants_image;
pub use process::image_stop_signal;
pub use resources::resources;

use super::ConvertError;
use super::sandbox::SandboxRecord;
use boxlite_proto::cri::v1::{
    ContainerConfig, LinuxContainerSecurityContext, NamespaceMode, SecurityProfile,
    security_profile::ProfileType,
};
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use std::path::Path;

/// Annotation that tells the guest to give the container every device it has.
pub const PRIVILEGED: &str = "boxlite.privileged";
/// Annotation that tells the guest to add the groups of the image's /etc/group to the supplemental ones ("merge").
pub const GROUPS: &str = "boxlite.groups";

/// The OCI version that is spoken; oci-spec 0.10 and libcontainer 0.7 know it.
const OCI_VERSION: &str = "1.0.2";
/// Paths hidden where the request names none: Docker's and containerd's default.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/proc/scsi",
];
/// Paths that may only be read where the request names none: likewise.
const READONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Everything a spec is made from.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// The container as the kubelet wants it.
    pub config: &'a ContainerConfig,
    /// Its pod.
    pub sandbox: &'a SandboxRecord,
    /// Its pod's id.
    pub sandbox_id: &'a str,
    /// Its image's configuration.
    pub image: &'a ImageConfiguration,
    /// Host directory with the pod's resolv.conf, hostname and hosts.
    pub files: &'a Path,
}

impl Source<'_> {
    fn security(&self) -> LinuxContainerSecurityContext {
        self.config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.clone())
            .unwrap_or_default()
    }

    fn image_config(&self) -> oci_spec::image::Config {
        self.image.config().clone().unwrap_or_default()
    }
}

/// The spec. Looks at the host only for the existence of mount sources.
pub fn spec(source: Source<'_>) -> Result<Spec, ConvertError> {
    let security = source.security();
    refuse(&source, &security)?;
    let linux = source.config.linux.as_ref();
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "cgroup"})];
    let pid = security
        .namespace_options
        .as_ref()
        .map_or(0, |options| options.pid);
    if pid == NamespaceMode::Container as i32 {
        namespaces.push(json!({"type": "pid"}));
    }
    let privileged = security.privileged;
    let (masked, readonly) = if privileged {
        (Vec::new(), Vec::new())
    } else {
        (
            or_default(&security.masked_paths, &MASKED),
            or_default(&security.readonly_paths, &READONLY),
        )
    };
    let mut resources = resources(linux.and_then(|linux| linux.resources.as_ref()))?;
    resources["devices"] = json!([{"allow": privileged, "access": "rwm"}]);
    let document = json!({
        "ociVersion": OCI_VERSION,
        "process": process::process(&source, &security)?,
        "root": {"path": "rootfs", "readonly": security.readonly_rootfs},
        "mounts": mounts::mounts(&source, &security)?,
        "annotations": annotations(&source, &security),
        "linux": {
            "namespaces": namespaces,
            "resources": resources,
            "maskedPaths": masked,
            "readonlyPaths": readonly,
        },
    });
    serde_json::from_value(document).map_err(|error| {
        ConvertError::invalid("config", "", format!("no OCI spec can be made: {error}"))
    })
}

/// What this runtime does not do, said by name.
fn refuse(
    source: &Source<'_>,
    security: &LinuxContainerSecurityContext,
) -> Result<(), ConvertError> {
    namespaces(security.namespace_options.as_ref())?;
    let network = security
        .namespace_options
        .as_ref()
        .map(|options| options.network);
    if network == Some(NamespaceMode::Node as i32) && !source.sandbox.host_network() {
        return Err(ConvertError::invalid(
            "namespace_options.network",
            "NODE",
            "the container's pod is not in the host's network",
        ));
    }
    if let Some(device) = source.config.devices.first() {
        return Err(ConvertError::unsupported(
            "config.devices",
            format!("{:?}", device.host_path),
            "a VM has no device of the host",
        ));
    }
    if let Some(device) = source.config.cdi_devices.first() {
        return Err(ConvertError::unsupported(
            "config.CDI_devices",
            format!("{:?}", device.name),
            "a VM has no device of the host",
        ));
    }
    localhost("seccomp", security.seccomp.as_ref())?;
    localhost("apparmor", security.apparmor.as_ref())?;
    Ok(())
}

/// RuntimeDefault and Unconfined are one here: the pod has a kernel of its own. A profile by name can't be honoured.
fn localhost(field: &'static str, profile: Option<&SecurityProfile>) -> Result<(), ConvertError> {
    match profile {
        Some(profile) if profile.profile_type == ProfileType::Localhost as i32 => {
            Err(ConvertError::unsupported(
                field,
                format!("{:?}", profile.localhost_ref),
                "localhost profiles are not loaded into the guest",
            ))
        }
        _ => Ok(()),
    }
}

/// Namespaces of the node can't be had in a VM; its network can be reached nevertheless.
pub fn namespaces(
    options: Option<&boxlite_proto::cri::v1::NamespaceOption>,
) -> Result<(), ConvertError> {
    let Some(options) = options else {
        return Ok(());
    };
    let node = NamespaceMode::Node as i32;
    for (field, mode, reason) in [
        (
            "namespace_options.pid",
            options.pid,
            "the host's processes are not visible in a VM",
        ),
        (
            "namespace_options.ipc",
            options.ipc,
            "the host's IPC is not reachable from a VM",
        ),
    ] {
        if mode == node {
            return Err(ConvertError::unsupported(field, "NODE", reason));
        }
    }
    match &options.userns_options {
        Some(userns) if userns.mode == NamespaceMode::Pod as i32 && !userns.uids.is_empty() => {
            Err(ConvertError::unsupported(
                "namespace_options.userns_options",
                "POD",
                "user namespaces are not there yet",
            ))
        }
        _ => Ok(()),
    }
}

fn or_default(wanted: &[String], default: &[&str]) -> Vec<String> {
    if wanted.is_empty() {
        default.iter().map(|&path| path.to_owned()).collect()
    } else {
        wanted.to_vec()
    }
}

/// containerd's annotations, by its names, and those that speak to the guest.
fn annotations(source: &Source<'_>, security: &LinuxContainerSecurityContext) -> Value {
    let name = source
        .config
        .metadata
        .as_ref()
        .map(|m| m.name.clone())
        .unwrap_or_default();
    let image = source.config.image.as_ref();
    let image_name = image
        .map(|image| {
            if image.user_specified_image.is_empty() {
                &image.image
            } else {
                &image.user_specified_image
            }
        })
        .cloned()
        .unwrap_or_default();
    let pod = source.sandbox.metadata();
    let mut annotations = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": source.sandbox_id,
        "io.kubernetes.cri.sandbox-name": pod.name,
        "io.kubernetes.cri.sandbox-namespace": pod.namespace,
        "io.kubernetes.cri.sandbox-uid": pod.uid,
        "io.kubernetes.cri.container-name": name,
        "io.kubernetes.cri.image-name": image_name,
    });
    if security.privileged {
        annotations[PRIVILEGED] = json!("true");
    }
    if user::merges_groups(security) {
        annotations[GROUPS] = json!("merge");
    }
    annotations
}
