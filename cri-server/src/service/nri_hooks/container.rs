//! NRI events of containers.

use super::messages::{container_message, pod_message, vcpus};
use super::updates::{apply_required, apply_updates};
use super::{Server, rejected};
use crate::convert::container::ContainerMetadata;
use crate::nri::{Session, adjust, messages, resources};
use crate::service::capacity;
use crate::service::error::ServiceError;
use boxlite_proto::cri::v1::{ContainerConfig, LinuxContainerResources};
use boxlite_proto::nri::v1alpha1::{Container, Event, LinuxResources, PodSandbox};
use boxlite_runtime::{ContainerOptions, ContainerSnapshot, ContainerState, LiteBox};
use tonic::Status;

/// Sends CreateContainer and returns the options with the plugins' adjustments. Nothing of the container exists yet.
pub(in crate::service) async fn create(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    config: &ContainerConfig,
    mut options: ContainerOptions,
) -> Result<ContainerOptions, Status> {
    if !session.has_plugins().await {
        return Ok(options);
    }
    let pod_message = pod_message(server, pod);
    let mut container = messages::new_container(&options.id, pod.id(), config, Some(&options.spec));
    let image_ref = ContainerMetadata::from_bytes(&options.metadata).image_ref;
    container.image = Some(messages::image(config, &image_ref, &options.image_id));
    // As in UpdateContainerResources, limits that the kubelet set are accepted.
    let room = capacity::of_pod(server, pod);
    let had = config.linux.as_ref().and_then(|l| l.resources.as_ref());
    let admit = |wanted: &LinuxResources| {
        let admitted = room.admit(&resources::cri(wanted), had);
        admitted.map_err(|beyond| beyond.to_string())
    };
    let done = async {
        let (adjustment, updates) = session
            .create(&pod_message, container.clone(), vcpus(pod), &admit)
            .await
            .map_err(rejected)?;
        options.spec =
            adjust::apply(&adjustment, options.spec).map_err(|error| ServiceError::Adjustment {
                id: container.id.clone(),
                reason: error.to_string(),
            })?;
        apply_required(server, updates).await?;
        if let Some(wanted) = adjustment.linux.and_then(|linux| linux.resources) {
            options.metadata =
                ContainerMetadata::updated(&options.metadata, &resources::cri(&wanted));
        }
        Ok(options)
    };
    let made = done.await;
    if made.is_err() {
        undo(server, session, &pod_message, &container).await;
    }
    made
}

/// Sends the stop and removal of a container whose creation failed after CreateContainer.
pub(in crate::service) async fn undo_create(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    id: &str,
    config: &ContainerConfig,
) {
    if session.has_plugins().await {
        let container = messages::new_container(id, pod.id(), config, None);
        undo(server, session, &pod_message(server, pod), &container).await;
    }
}

async fn undo(server: &Server, session: &Session, pod: &PodSandbox, container: &Container) {
    // Updates of other containers that plugins request because this one ended apply in any case.
    let updates = session.stop(pod, container).await;
    apply_updates(server, updates).await;
    session
        .notify(Event::RemoveContainer, pod, Some(container))
        .await;
    session.forget(&container.id);
}

/// Sends StartContainer, which plugins may reject. Does nothing for a container that is already running.
pub(in crate::service) async fn start(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    container: &ContainerSnapshot,
) -> Result<(), Status> {
    if container.state == ContainerState::Created && session.has_plugins().await {
        let message = container_message(pod, container).await;
        session
            .request(
                Event::StartContainer,
                &pod_message(server, pod),
                Some(&message),
            )
            .await
            .map_err(rejected)?;
    }
    Ok(())
}

/// Sends PostCreateContainer, PostStartContainer or PostUpdateContainer.
pub(in crate::service) async fn notify_container(
    server: &Server,
    session: &Session,
    event: Event,
    pod: &LiteBox,
    id: &str,
) {
    if session.has_plugins().await
        && let Ok(container) = pod.container(id)
    {
        let message = container_message(pod, &container).await;
        session
            .notify(event, &pod_message(server, pod), Some(&message))
            .await;
    }
}

/// Spawns a task that sends StopContainer when the container ends. The task belongs to NRI and ends with the container, the pod or the
/// daemon.
pub(in crate::service) fn watch(server: &Server, pod: &LiteBox, id: &str) {
    let nri = server.nri_registry();
    if !nri.is_on() {
        return;
    }
    let (server, pod, id) = (server.clone(), pod.clone(), id.to_owned());
    nri.spawn(async move {
        let ended = |pod: &LiteBox| {
            pod.container(&id)
                .map_or(true, |container| container.state == ContainerState::Exited)
        };
        pod.changed_until(|_| ended(&pod)).await;
        container_ended(&server, &pod, &id).await;
    });
}

/// Sends StopContainer, once per container: the RPC or the watcher, whichever comes first.
pub(in crate::service) async fn container_ended(server: &Server, pod: &LiteBox, id: &str) {
    let nri = server.nri_registry();
    if !nri.is_on() || nri.was_stopped(id) {
        return;
    }
    let session = server.session().await;
    match pod.container(id) {
        Ok(container) if container.state == ContainerState::Exited => {
            let message = container_message(pod, &container).await;
            let updates = session.stop(&pod_message(server, pod), &message).await;
            apply_updates(server, updates).await;
        }
        _ => {}
    }
}

/// Sends RemoveContainer for a container that has ended or never ran.
pub(in crate::service) async fn remove(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    container: &ContainerSnapshot,
) {
    if session.has_plugins().await {
        let pod_message = pod_message(server, pod);
        let message = container_message(pod, container).await;
        // A container that was created and never ran has no StopContainer yet, and NRI's order requires one.
        let updates = session.stop(&pod_message, &message).await;
        apply_updates(server, updates).await;
        session
            .notify(Event::RemoveContainer, &pod_message, Some(&message))
            .await;
    }
}

/// Sends UpdateContainer and returns the resources with the plugins' changes, after their updates of other containers are applied.
pub(in crate::service) async fn update(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    container: &ContainerSnapshot,
    requested: LinuxContainerResources,
) -> Result<LinuxContainerResources, Status> {
    if !session.has_plugins().await {
        return Ok(requested);
    }
    let message = container_message(pod, container).await;
    let (wanted, others) = session
        .update(
            &pod_message(server, pod),
            &message,
            resources::from_cri(&requested),
            vcpus(pod),
        )
        .await
        .map_err(rejected)?;
    apply_required(server, others).await?;
    // Fields that NRI lacks keep their requested values.
    let kept = requested;
    Ok(LinuxContainerResources {
        oom_score_adj: kept.oom_score_adj,
        hugepage_limits: kept.hugepage_limits,
        ..resources::cri(&wanted)
    })
}
