//! NRI messages of pods and containers.
//!
//! Internals of this runtime (its annotations, paths in the guest) are omitted. A container's process has no pid on
//! the host, so `pid` is 0.

use super::resources::{self, text, text_map};
use crate::convert::sandbox::PodMetadata;
use boxlite_proto::cri::v1::{ContainerConfig, LinuxContainerResources};
use boxlite_proto::nri::v1alpha1::{
    Container, ContainerState as State, Image, LinuxContainer, LinuxDevice, LinuxNamespace,
    LinuxPodSandbox, LinuxResources, Mount, OptionalFileMode, OptionalInt, OptionalUInt32,
    PodSandbox, PosixRlimit, User,
};
use boxlite_runtime::{BoxSnapshot, ContainerSnapshot, ContainerState};
use oci_spec::runtime::Spec;
use serde_json::Value;

/// Returns the message of a pod.
pub(crate) fn pod(snapshot: &BoxSnapshot, record: &PodMetadata) -> PodSandbox {
    let metadata = record.metadata();
    let config = record.config.clone().unwrap_or_default();
    let linux = config.linux.unwrap_or_default();
    let all = |limits: &Option<LinuxContainerResources>| limits.as_ref().map(resources::from_cri);
    PodSandbox {
        id: snapshot.id.clone(),
        name: metadata.name,
        uid: metadata.uid,
        namespace: metadata.namespace,
        labels: config.labels,
        annotations: config.annotations,
        runtime_handler: record.runtime_handler.clone(),
        linux: Some(LinuxPodSandbox {
            pod_overhead: all(&linux.overhead),
            pod_resources: all(&linux.resources),
            cgroup_parent: linux.cgroup_parent,
            namespaces: network_namespace(snapshot).into_iter().collect(),
            ..Default::default()
        }),
        pid: snapshot
            .shim_pid
            .and_then(|pid| u32::try_from(pid).ok())
            .unwrap_or(0),
        ips: record.addresses.clone(),
    }
}

/// Returns the pod's network namespace on the host, by which network plugins add interfaces. Its other namespaces are in the VM.
fn network_namespace(snapshot: &BoxSnapshot) -> Option<LinuxNamespace> {
    let path = snapshot.options.netns.as_ref()?;
    Some(LinuxNamespace {
        r#type: "network".into(),
        path: path.to_string_lossy().into_owned(),
    })
}

/// Returns the message of a container that is being created, from its config and spec.
pub(crate) fn new_container(
    id: &str,
    pod: &str,
    config: &ContainerConfig,
    spec: Option<&Spec>,
) -> Container {
    let mut container = Container {
        id: id.to_owned(),
        pod_sandbox_id: pod.to_owned(),
        name: config
            .metadata
            .as_ref()
            .map(|metadata| metadata.name.clone())
            .unwrap_or_default(),
        labels: config.labels.clone(),
        annotations: config.annotations.clone(),
        linux: Some(LinuxContainer::default()),
        ..Default::default()
    };
    if let Some(spec) = spec.and_then(|spec| serde_json::to_value(spec).ok()) {
        from_spec(&mut container, &spec);
    }
    container
}

/// Returns the message of a container. `now` has the resources if they changed since its creation.
pub(crate) fn container(
    snapshot: &ContainerSnapshot,
    config: &ContainerConfig,
    spec: Option<&Spec>,
    now: Option<&LinuxContainerResources>,
) -> Container {
    let mut container = new_container(&snapshot.id, &snapshot.box_id, config, spec);
    container.state = match snapshot.state {
        ContainerState::Created => State::ContainerCreated,
        ContainerState::Running => State::ContainerRunning,
        ContainerState::Exited => State::ContainerStopped,
        ContainerState::Unknown => State::ContainerUnknown,
    } as i32;
    container.created_at = snapshot.created_at_ns;
    container.started_at = snapshot.started_at_ns;
    container.finished_at = snapshot.finished_at_ns;
    container.exit_code = snapshot.exit_code;
    container.status_reason = snapshot.reason.clone();
    container.status_message = snapshot.message.clone();
    if let Some(now) = now {
        let linux = container.linux.get_or_insert_default();
        let all: &mut LinuxResources = linux.resources.get_or_insert_default();
        resources::overlay(all, &resources::from_cri(now));
    }
    container
}

/// Returns the identity of a container's image. `image_ref` is a reference with a digest, or the image's id.
pub(crate) fn image(config: &ContainerConfig, image_ref: &str, image_id: &str) -> Image {
    let spec = config.image.clone().unwrap_or_default();
    let name = match spec.user_specified_image.is_empty() {
        true => spec.image,
        false => spec.user_specified_image,
    };
    let digest = image_ref.split_once('@').map_or("", |(_, digest)| digest);
    Image {
        name,
        digest: digest.to_owned(),
        config_digest: image_id.to_owned(),
    }
}

fn from_spec(container: &mut Container, spec: &Value) {
    let process = &spec["process"];
    container.args = texts(&process["args"]);
    container.env = texts(&process["env"]);
    for (key, value) in spec["annotations"].as_object().into_iter().flatten() {
        let own = key.starts_with("boxlite.") || key.starts_with("io.boxlite.");
        if !own {
            container.annotations.insert(key.clone(), text(value));
        }
    }
    container.mounts = each(&spec["mounts"], |mount| Mount {
        destination: text(&mount["destination"]),
        r#type: text(&mount["type"]),
        source: text(&mount["source"]),
        options: texts(&mount["options"]),
    });
    container.rlimits = each(&process["rlimits"], |limit| PosixRlimit {
        r#type: text(&limit["type"]),
        hard: limit["hard"].as_u64().unwrap_or(0),
        soft: limit["soft"].as_u64().unwrap_or(0),
    });
    let user = &process["user"];
    container.user = Some(User {
        uid: number(&user["uid"]).unwrap_or(0),
        gid: number(&user["gid"]).unwrap_or(0),
        additional_gids: user["additionalGids"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(number)
            .collect(),
    });
    let linux = &spec["linux"];
    container.linux = Some(LinuxContainer {
        namespaces: each(&linux["namespaces"], |namespace| LinuxNamespace {
            r#type: text(&namespace["type"]),
            path: text(&namespace["path"]),
        }),
        devices: each(&linux["devices"], device),
        resources: Some(resources::from_oci(&linux["resources"])),
        oom_score_adj: process["oomScoreAdj"]
            .as_i64()
            .map(|value| OptionalInt { value }),
        sysctl: text_map(&linux["sysctl"]),
        ..Default::default()
    });
}

fn device(device: &Value) -> LinuxDevice {
    LinuxDevice {
        path: text(&device["path"]),
        r#type: text(&device["type"]),
        major: device["major"].as_i64().unwrap_or(0),
        minor: device["minor"].as_i64().unwrap_or(0),
        file_mode: number(&device["fileMode"]).map(|value| OptionalFileMode { value }),
        uid: number(&device["uid"]).map(|value| OptionalUInt32 { value }),
        gid: number(&device["gid"]).map(|value| OptionalUInt32 { value }),
    }
}

fn texts(value: &Value) -> Vec<String> {
    each(value, text)
}

fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|number| u32::try_from(number).ok())
}

fn each<T>(value: &Value, make: impl Fn(&Value) -> T) -> Vec<T> {
    value.as_array().into_iter().flatten().map(make).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::cri::v1::ImageSpec;

    #[test]
    fn image_has_name_and_digests() {
        let config = ContainerConfig {
            image: Some(ImageSpec {
                image: "sha256:cc".into(),
                user_specified_image: "registry.test/app:1".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let image = image(&config, "registry.test/app@sha256:aa", "sha256:cc");
        assert_eq!(image.name, "registry.test/app:1");
        assert_eq!(image.digest, "sha256:aa");
        assert_eq!(image.config_digest, "sha256:cc");
    }
}
