//! NRI events of pods.

use super::container::{container_ended, remove};
use super::messages::pod_message;
use super::{Server, rejected};
use crate::nri::{Session, resources};
use boxlite_proto::cri::v1::LinuxContainerResources;
use boxlite_proto::nri::v1alpha1::{Event, UpdatePodSandboxRequest};
use boxlite_runtime::LiteBox;
use std::time::Duration;
use tonic::Status;

const SIGKILL: i32 = 9;

/// Sends RunPodSandbox while the pod runs and is not listed yet. If a plugin rejects the pod, all plugins get its stop and removal.
pub(in crate::service) async fn run_pod(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
) -> Result<(), Status> {
    if !session.has_plugins().await {
        return Ok(());
    }
    let message = pod_message(server, pod);
    let asked = session.request(Event::RunPodSandbox, &message, None).await;
    if let Err(error) = asked {
        session.notify(Event::StopPodSandbox, &message, None).await;
        session
            .notify(Event::RemovePodSandbox, &message, None)
            .await;
        return Err(rejected(error));
    }
    Ok(())
}

/// Sends UpdatePodSandbox, which plugins may reject.
pub(in crate::service) async fn update_pod(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    limits: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
) -> Result<(), Status> {
    if !session.has_plugins().await {
        return Ok(());
    }
    let request = UpdatePodSandboxRequest {
        pod: Some(pod_message(server, pod)),
        overhead_linux_resources: overhead.map(resources::from_cri),
        linux_resources: limits.map(resources::from_cri),
    };
    session.update_pod(&request).await.map_err(rejected)
}

/// Sends an event of a pod that plugins cannot reject.
pub(in crate::service) async fn notify_pod(
    server: &Server,
    session: &Session,
    event: Event,
    pod: &LiteBox,
) {
    if session.has_plugins().await {
        session.notify(event, &pod_message(server, pod), None).await;
    }
}

/// Ends the containers of a pod, then sends StopContainer for each and StopPodSandbox, once per pod. Failures are logged, not
/// returned, because the VM is shut down next.
pub(in crate::service) async fn stop_pod(server: &Server, pod: &LiteBox) {
    let nri = server.nri_registry();
    if !nri.is_on() || nri.was_stopped(pod.id()) || server.starting.lock().contains(pod.id()) {
        return;
    }
    if !server.session().await.has_plugins().await {
        let ids = pod.containers().into_iter().map(|container| container.id);
        nri.mark_stopped(ids.chain([pod.id().to_owned()]));
        return;
    }
    let containers = pod.containers();
    let ending = containers.iter().map(|container| async {
        if let Err(error) = pod
            .stop_container(&container.id, Duration::ZERO, SIGKILL)
            .await
        {
            tracing::warn!(
                id = container.id,
                error = boxlite_runtime::report(&error),
                "failed to stop container before its pod"
            );
        }
    });
    futures::future::join_all(ending).await;
    for container in &containers {
        container_ended(server, pod, &container.id).await;
    }
    let session = server.session().await;
    session.stop_pod(&pod_message(server, pod)).await;
}

/// Sends RemoveContainer for each container of a stopped pod, then RemovePodSandbox.
pub(in crate::service) async fn remove_pod(server: &Server, session: &Session, pod: &LiteBox) {
    if session.has_plugins().await {
        for container in pod.containers() {
            remove(server, session, pod, &container).await;
        }
        let mut message = pod_message(server, pod);
        if let Some(linux) = &mut message.linux {
            // The network namespace was removed when the pod was stopped.
            linux.namespaces.clear();
        }
        session
            .notify(Event::RemovePodSandbox, &message, None)
            .await;
    }
}
