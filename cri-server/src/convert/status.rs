//! Conversion of the runtime's snapshots to the CRI's states and statuses.

use super::container::ContainerMetadata;
use super::sandbox::PodMetadata;
use super::signal;
use boxlite_proto::cri::v1::{
    Container, ContainerEventResponse, ContainerEventType, ContainerResources, ContainerState,
    ContainerStatus, ContainerUser, ImageSpec, LinuxContainerUser, LinuxPodSandboxStatus,
    Namespace, PodIp, PodSandbox, PodSandboxNetworkStatus, PodSandboxState, PodSandboxStatus,
};
use boxlite_runtime as runtime;
use boxlite_runtime::{
    BoxEvent, BoxSnapshot, BoxState, ContainerSnapshot, ErrorKind, EventKind, RuntimeError,
};
use tonic::{Code, Status};

/// Returns the gRPC status of a runtime error: its kind, with the chain of causes as the message.
pub(crate) fn status(error: &RuntimeError) -> Status {
    Status::new(code(error.kind()), runtime::report(error))
}

/// Returns the gRPC code of an error class.
pub(crate) fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::InvalidArgument => Code::InvalidArgument,
        ErrorKind::FailedPrecondition => Code::FailedPrecondition,
        ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorKind::ResourceExhausted => Code::ResourceExhausted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Internal => Code::Internal,
    }
}

fn sandbox_state(state: BoxState) -> PodSandboxState {
    match state {
        BoxState::Ready => PodSandboxState::SandboxReady,
        BoxState::Created | BoxState::Starting | BoxState::NotReady | BoxState::Removing => {
            PodSandboxState::SandboxNotready
        }
    }
}

/// Returns the list entry of a pod.
pub(crate) fn sandbox(snapshot: &BoxSnapshot) -> PodSandbox {
    let record = PodMetadata::from_bytes(&snapshot.metadata);
    let config = record.config.clone().unwrap_or_default();
    PodSandbox {
        id: snapshot.id.clone(),
        metadata: config.metadata,
        state: sandbox_state(snapshot.state) as i32,
        created_at: snapshot.created_at_ns,
        labels: config.labels,
        annotations: config.annotations,
        runtime_handler: record.runtime_handler,
    }
}

/// Returns the status of a pod. A pod that is not ready has no network.
pub(crate) fn sandbox_status(snapshot: &BoxSnapshot) -> PodSandboxStatus {
    let record = PodMetadata::from_bytes(&snapshot.metadata);
    let config = record.config.clone().unwrap_or_default();
    let addresses: &[String] = if snapshot.state == BoxState::Ready {
        &record.addresses
    } else {
        &[]
    };
    let options = config
        .linux
        .and_then(|linux| linux.security_context)
        .and_then(|security| security.namespace_options);
    PodSandboxStatus {
        id: snapshot.id.clone(),
        metadata: config.metadata,
        state: sandbox_state(snapshot.state) as i32,
        created_at: snapshot.created_at_ns,
        network: Some(PodSandboxNetworkStatus {
            ip: addresses.first().cloned().unwrap_or_default(),
            additional_ips: addresses
                .iter()
                .skip(1)
                .map(|ip| PodIp { ip: ip.clone() })
                .collect(),
        }),
        linux: Some(LinuxPodSandboxStatus {
            namespaces: Some(Namespace {
                options: Some(options.unwrap_or_default()),
            }),
        }),
        labels: config.labels,
        annotations: config.annotations,
        runtime_handler: record.runtime_handler,
    }
}

fn container_state(state: runtime::ContainerState) -> ContainerState {
    match state {
        runtime::ContainerState::Created => ContainerState::ContainerCreated,
        runtime::ContainerState::Running => ContainerState::ContainerRunning,
        runtime::ContainerState::Exited => ContainerState::ContainerExited,
        runtime::ContainerState::Unknown => ContainerState::ContainerUnknown,
    }
}

/// Returns the list entry of a container.
pub(crate) fn container(snapshot: &ContainerSnapshot) -> Container {
    let record = ContainerMetadata::from_bytes(&snapshot.metadata);
    let config = record.config();
    Container {
        id: snapshot.id.clone(),
        pod_sandbox_id: snapshot.box_id.clone(),
        metadata: config.metadata,
        image: config.image,
        image_ref: record.image_ref,
        state: container_state(snapshot.state) as i32,
        created_at: snapshot.created_at_ns,
        labels: config.labels,
        annotations: config.annotations,
        image_id: snapshot.image_id.clone(),
    }
}

fn user(user: &runtime::ContainerUser) -> ContainerUser {
    ContainerUser {
        linux: Some(LinuxContainerUser {
            uid: user.uid.into(),
            gid: user.gid.into(),
            supplemental_groups: user
                .supplemental_groups
                .iter()
                .map(|group| i64::from(*group))
                .collect(),
        }),
    }
}

/// Returns the status of a container.
pub(crate) fn container_status(snapshot: &ContainerSnapshot) -> ContainerStatus {
    let record = ContainerMetadata::from_bytes(&snapshot.metadata);
    let config = record.config();
    let linux = record.resources();
    ContainerStatus {
        id: snapshot.id.clone(),
        metadata: config.metadata,
        state: container_state(snapshot.state) as i32,
        created_at: snapshot.created_at_ns,
        started_at: snapshot.started_at_ns,
        finished_at: snapshot.finished_at_ns,
        exit_code: snapshot.exit_code,
        image: Some(ImageSpec {
            // The kubelet displays the name of the pod spec.
            image: config
                .image
                .map(|image| {
                    if image.user_specified_image.is_empty() {
                        image.image
                    } else {
                        image.user_specified_image
                    }
                })
                .unwrap_or_default(),
            ..Default::default()
        }),
        image_ref: record.image_ref,
        reason: snapshot.reason.clone(),
        message: snapshot.message.clone(),
        labels: config.labels,
        annotations: config.annotations,
        mounts: config.mounts,
        log_path: record.log_path,
        resources: linux.map(|linux| ContainerResources {
            linux: Some(linux),
            windows: None,
        }),
        image_id: snapshot.image_id.clone(),
        user: snapshot.user.as_ref().map(user),
        stop_signal: signal::to_cri(record.stop_signal) as i32,
    }
}

/// Returns an event with the statuses at its time.
pub(crate) fn event(event: &BoxEvent) -> ContainerEventResponse {
    let kind = match event.kind {
        EventKind::Created => ContainerEventType::ContainerCreatedEvent,
        EventKind::Started => ContainerEventType::ContainerStartedEvent,
        EventKind::Stopped => ContainerEventType::ContainerStoppedEvent,
        EventKind::Deleted => ContainerEventType::ContainerDeletedEvent,
    };
    ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: kind as i32,
        created_at: event.at_ns,
        pod_sandbox_status: Some(sandbox_status(&event.state.sandbox)),
        containers_statuses: event
            .state
            .containers
            .iter()
            .map(container_status)
            .collect(),
    }
}
