//! OCI spec of a container, as containerd's CRI plugin writes it, except for the differences of a VM.
//!
//! Differences: the network, IPC and UTS namespaces are those of the VM, so the spec has none; `process.user` may
//! have a name that only the guest can resolve (see `user`); `/dev/shm` and devices except disks are the guest's (see
//! `devices`); the guest's kernel has no AppArmor and SELinux (see `convert::lsm`). Mount sources are host paths, which the
//! runtime converts to guest paths.
//!
//! The spec is written as JSON, the form that the specification defines, and parsed into its type, so that unknown
//! fields fail here.

mod capabilities;
mod devices;
mod image_volumes;
mod mounts;
mod process;
mod propagation;
mod resources;
mod seccomp;
#[cfg(test)]
mod tests;
mod user;

pub(crate) use mounts::image_source;
pub(crate) use process::image_stop_signal;
pub(crate) use resources::{resources, without_host_cpusets};

use super::sandbox::PodMetadata;
use super::{ConvertError, lsm, userns};
use boxlite_proto::cri::v1::{ContainerConfig, LinuxContainerSecurityContext, NamespaceMode};
use boxlite_proto::names;
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use std::path::Path;

/// Version of the OCI runtime specification; oci-spec 0.10 and libcontainer 0.7 support it.
const OCI_VERSION: &str = "1.0.2";

/// Input of a spec.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source<'a> {
    /// Config of the request.
    pub config: &'a ContainerConfig,
    /// Metadata of its pod.
    pub sandbox: &'a PodMetadata,
    /// Id of its pod.
    pub sandbox_id: &'a str,
    /// Configuration of its image.
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

/// Returns the spec. Reads only mount sources and devices on the host.
pub(crate) fn spec(source: Source<'_>) -> Result<Spec, ConvertError> {
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
    // As in containerd, the lists of the request are used as they are: the kubelet sends its defaults, and empty
    // lists for procMount: Unmasked.
    let (masked, readonly) = if privileged {
        (&[][..], &[][..])
    } else {
        (
            security.masked_paths.as_slice(),
            security.readonly_paths.as_slice(),
        )
    };
    let process = process::process(&source, &security)?;
    let seccomp = seccomp::seccomp(&security, &process["capabilities"]["bounding"])?;
    let requested = linux.and_then(|linux| linux.resources.as_ref());
    let mut resources = resources(requested.map(without_host_cpusets).as_ref())?;
    let devices = devices::devices(&source.config.devices)?;
    let mut rules = vec![json!({"allow": privileged, "access": "rwm"})];
    rules.extend(devices.rules);
    resources["devices"] = json!(rules);
    let mut document = json!({
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": {"path": "rootfs", "readonly": security.readonly_rootfs},
        "mounts": mounts::mounts(&source, &security)?,
        "annotations": annotations(&source, &security, devices.of_guest)?,
        "linux": {
            "namespaces": namespaces,
            "resources": resources,
            "maskedPaths": masked,
            "readonlyPaths": readonly,
            "devices": devices.nodes,
        },
    });
    let linux = &mut document["linux"];
    if let Some(profile) = seccomp {
        linux["seccomp"] = profile;
    }
    if let Some(mapping) = user_namespace(&source, &security)? {
        linux["uidMappings"] = mapping.oci();
        linux["gidMappings"] = mapping.oci();
        if let Some(namespaces) = linux["namespaces"].as_array_mut() {
            namespaces.push(json!({"type": "user"}));
        }
    }
    serde_json::from_value(document).map_err(|error| {
        ConvertError::invalid(
            "config",
            "",
            format!("results in an invalid OCI spec: {error}"),
        )
    })
}

/// Rejects unsupported requests by name.
fn refuse(
    source: &Source<'_>,
    security: &LinuxContainerSecurityContext,
) -> Result<(), ConvertError> {
    userns::check_namespaces(security.namespace_options.as_ref())?;
    if security.privileged && !source.sandbox.is_privileged() {
        return Err(ConvertError::invalid(
            "security_context.privileged",
            "true",
            "if a privileged container is to be executed within a pod sandbox, the sandbox's security_context.privileged must be true",
        ));
    }
    let network = security
        .namespace_options
        .as_ref()
        .map(|options| options.network);
    if network == Some(NamespaceMode::Node as i32) && !source.sandbox.host_network() {
        return Err(ConvertError::invalid(
            "namespace_options.network",
            "NODE",
            "the pod sandbox does not use the host network",
        ));
    }
    if let Some(device) = source.config.cdi_devices.first() {
        return Err(ConvertError::unsupported(
            "config.CDI_devices",
            format!("{:?}", device.name),
            "host devices are not available in a VM",
        ));
    }
    lsm::container(security)
}

/// Returns the ID mapping of the pod, if it has a user namespace. A container may only repeat it.
fn user_namespace(
    source: &Source<'_>,
    security: &LinuxContainerSecurityContext,
) -> Result<Option<userns::Mapping>, ConvertError> {
    let pods = userns::mapping(source.sandbox.userns())?;
    let options = security.namespace_options.as_ref();
    if let Some(own) = options.and_then(|options| options.userns_options.as_ref())
        && userns::mapping(Some(own))? != pods
    {
        return Err(ConvertError::invalid(
            "namespace_options.userns_options",
            "",
            "differs from the pod sandbox",
        ));
    }
    Ok(pods)
}

/// Returns containerd's annotations and those for the guest.
fn annotations(
    source: &Source<'_>,
    security: &LinuxContainerSecurityContext,
    devices: Option<String>,
) -> Result<Value, ConvertError> {
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
        annotations[names::PRIVILEGED_ANNOTATION] = json!("true");
    }
    if user::merges_groups(security) {
        annotations[names::GROUPS_ANNOTATION] = json!("merge");
    }
    if let Some(devices) = devices {
        annotations[names::DEVICES_ANNOTATION] = json!(devices);
    }
    Ok(annotations)
}
