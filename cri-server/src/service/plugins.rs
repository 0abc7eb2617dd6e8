//! What the verbs tell NRI's plugins, and what of the plugins' answers is carried out.
//!
//! Each verb keeps one [`Session`] from its event until its change can be seen, so that no new plugin misses it; none is kept while
//! something is waited for that may take long. Where NRI is off or nobody listens, nothing is read and nothing waits. How plugins are
//! reached is `nri`'s; this file knows pods, containers and their records.

use super::{Inner, Server, lock, refused};
use crate::convert::container::ContainerRecord;
use crate::nri::{Host, Nri, Session, SessionError, adjust, describe, resources};
use crate::server::socket::SocketError;
use boxlite_proto::cri::v1::{ContainerConfig, LinuxContainerResources};
use boxlite_proto::nri::v1alpha1::{
    Container, ContainerUpdate, Event, LinuxResources, PodSandbox, UpdatePodSandboxRequest,
};
use boxlite_runtime::{ContainerOptions, ContainerSnapshot, ContainerState, LiteBox};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tonic::Status;

const SIGKILL: i32 = 9;

impl Server {
    /// Starts NRI by the configuration. Once, before the first call.
    pub async fn start_nri(&self) -> Result<(), SocketError> {
        let host = Arc::new(Lent(Arc::downgrade(&self.0)));
        let nri = Nri::start(&self.config.nri, host).await?;
        let ended = self.runtime.containers().into_iter();
        nri.already_stopped(
            ended
                .filter(|container| container.state == ContainerState::Exited)
                .map(|container| container.id),
        );
        // A second start is a bug of the caller's and changes nothing.
        let _ = self.nri.set(nri);
        for pod in self.runtime.handles() {
            for container in pod.containers() {
                if container.state == ContainerState::Running {
                    watch(self, &pod, &container.id);
                }
            }
        }
        Ok(())
    }

    /// Ends NRI. No call may come any more.
    pub async fn stop_nri(&self) {
        self.plugins().stop().await;
    }

    fn plugins(&self) -> Nri {
        self.nri.get().cloned().unwrap_or_default()
    }

    /// Lets a verb in; see [`Nri::enter`].
    pub(super) async fn session(&self) -> Session {
        self.plugins().enter().await
    }
}

/// The service as NRI's registry knows it.
#[derive(Debug)]
struct Lent(Weak<Inner>);

#[tonic::async_trait]
impl Host for Lent {
    async fn snapshot(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        let Some(server) = self.0.upgrade().map(Server) else {
            return Default::default();
        };
        let starting = lock(&server.starting).clone();
        let (mut pods, mut containers) = (Vec::new(), Vec::new());
        for pod in server.runtime.handles() {
            if starting.contains(pod.id()) || server.plugins().was_stopped(pod.id()) {
                continue;
            }
            pods.push(pod_message(&server, &pod));
            for container in pod.containers() {
                if matches!(
                    container.state,
                    ContainerState::Created | ContainerState::Running
                ) {
                    containers.push(message(&pod, &container).await);
                }
            }
        }
        (pods, containers)
    }

    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate> {
        match self.0.upgrade().map(Server) {
            Some(server) => carry_out(&server, updates).await,
            None => updates,
        }
    }
}

fn pod_message(server: &Server, pod: &LiteBox) -> PodSandbox {
    describe::pod(&pod.snapshot(), &server.pod_record(pod))
}

async fn message(pod: &LiteBox, container: &ContainerSnapshot) -> Container {
    let spec = match pod.container_spec(&container.id).await {
        Ok(spec) => Some(spec),
        Err(error) => {
            tracing::warn!(
                id = container.id,
                error = boxlite_runtime::report(&error),
                "plugins are told of a container without its spec"
            );
            None
        }
    };
    let record = ContainerRecord::decoded(&container.metadata);
    let (config, now) = (record.config(), record.resources());
    describe::container(container, &config, spec.as_ref(), now.as_ref())
}

fn no(error: SessionError) -> Status {
    Status::failed_precondition(boxlite_runtime::report(&error))
}

/// RunPodSandbox: the pod runs and nobody sees it yet. After a refusal every plugin is told that it is gone again.
pub async fn run_pod(server: &Server, session: &Session, pod: &LiteBox) -> Result<(), Status> {
    if !session.heard().await {
        return Ok(());
    }
    let message = pod_message(server, pod);
    let asked = session.ask(Event::RunPodSandbox, &message, None).await;
    if let Err(error) = asked {
        session.tell(Event::StopPodSandbox, &message, None).await;
        session.tell(Event::RemovePodSandbox, &message, None).await;
        return Err(no(error));
    }
    Ok(())
}

/// UpdatePodSandbox: may be refused.
pub async fn update_pod(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    wish: Option<&LinuxContainerResources>,
    overhead: Option<&LinuxContainerResources>,
) -> Result<(), Status> {
    if !session.heard().await {
        return Ok(());
    }
    let request = UpdatePodSandboxRequest {
        pod: Some(pod_message(server, pod)),
        overhead_linux_resources: overhead.map(resources::from_cri),
        linux_resources: wish.map(resources::from_cri),
    };
    session.update_pod(&request).await.map_err(no)
}

/// An event of a pod that only tells.
pub async fn tell_pod(server: &Server, session: &Session, event: Event, pod: &LiteBox) {
    if session.heard().await {
        session.tell(event, &pod_message(server, pod), None).await;
    }
}

/// StopPodSandbox: ends the containers, tells of each, then of the pod. Once for each pod; what fails is said in the log, since the VM ends next.
pub async fn stop_pod(server: &Server, pod: &LiteBox) {
    let nri = server.plugins();
    if !nri.is_on() || nri.was_stopped(pod.id()) || lock(&server.starting).contains(pod.id()) {
        return;
    }
    if !server.session().await.heard().await {
        let ids = pod.containers().into_iter().map(|container| container.id);
        nri.already_stopped(ids.chain([pod.id().to_owned()]));
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
                "a container does not end before its pod"
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

/// RemovePodSandbox: tells of the containers that go with the pod, then of the pod. It is stopped already.
pub async fn remove_pod(server: &Server, session: &Session, pod: &LiteBox) {
    if session.heard().await {
        for container in pod.containers() {
            remove(server, session, pod, &container).await;
        }
        tell_pod(server, session, Event::RemovePodSandbox, pod).await;
    }
}

/// CreateContainer: the options as the plugins want them. Nothing of the container is there yet.
pub async fn create(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    config: &ContainerConfig,
    mut options: ContainerOptions,
) -> Result<ContainerOptions, Status> {
    if !session.heard().await {
        return Ok(options);
    }
    let pod_message = pod_message(server, pod);
    let container = describe::new_container(&options.id, pod.id(), config, Some(&options.spec));
    // As UpdateContainerResources has it: what the kubelet itself has asked for is let through.
    let room = super::container_update::room(server, pod);
    let had = config.linux.as_ref().and_then(|l| l.resources.as_ref());
    let admit = |wanted: &LinuxResources| {
        let admitted = room.admit(&resources::cri(wanted), had);
        admitted.map_err(|beyond| beyond.to_string())
    };
    let done = async {
        let (adjustment, updates) = session
            .create(&pod_message, container.clone(), vcpus(pod), &admit)
            .await
            .map_err(no)?;
        options.spec = adjust::apply(&adjustment, options.spec)
            .map_err(|error| Status::failed_precondition(format!("NRI: {error}")))?;
        insist(server, updates).await?;
        if let Some(wanted) = adjustment.linux.and_then(|linux| linux.resources) {
            options.metadata =
                ContainerRecord::updated(&options.metadata, &resources::cri(&wanted));
        }
        Ok(options)
    };
    let made = done.await;
    if made.is_err() {
        undo(server, session, &pod_message, &container).await;
    }
    made
}

/// A container that plugins know of was not created after all.
pub async fn undo_create(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    id: &str,
    config: &ContainerConfig,
) {
    if session.heard().await {
        let container = describe::new_container(id, pod.id(), config, None);
        undo(server, session, &pod_message(server, pod), &container).await;
    }
}

async fn undo(server: &Server, session: &Session, pod: &PodSandbox, container: &Container) {
    // What plugins want of others because this one ended, they want all the same.
    let updates = session.stop(pod, container).await;
    carry_out(server, updates).await;
    session
        .tell(Event::RemoveContainer, pod, Some(container))
        .await;
    session.forget(&container.id);
}

/// StartContainer: may be refused. A container that runs already is not started again.
pub async fn start(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    container: &ContainerSnapshot,
) -> Result<(), Status> {
    if container.state == ContainerState::Created && session.heard().await {
        let message = message(pod, container).await;
        session
            .ask(
                Event::StartContainer,
                &pod_message(server, pod),
                Some(&message),
            )
            .await
            .map_err(no)?;
    }
    Ok(())
}

/// PostCreateContainer, PostStartContainer, PostUpdateContainer.
pub async fn after(server: &Server, session: &Session, event: Event, pod: &LiteBox, id: &str) {
    if session.heard().await
        && let Ok(container) = pod.container(id)
    {
        let message = message(pod, &container).await;
        session
            .tell(event, &pod_message(server, pod), Some(&message))
            .await;
    }
}

/// Tells of a container's end whenever it comes. The task is NRI's, and ends with the container, the box or the daemon.
pub fn watch(server: &Server, pod: &LiteBox, id: &str) {
    let nri = server.plugins();
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

/// StopContainer, once for each container: by the verb or by the watcher, whoever comes first.
pub async fn container_ended(server: &Server, pod: &LiteBox, id: &str) {
    let nri = server.plugins();
    if !nri.is_on() || nri.was_stopped(id) {
        return;
    }
    let session = server.session().await;
    match pod.container(id) {
        Ok(container) if container.state == ContainerState::Exited => {
            let message = message(pod, &container).await;
            let updates = session.stop(&pod_message(server, pod), &message).await;
            carry_out(server, updates).await;
        }
        _ => {}
    }
}

/// RemoveContainer; it has ended, or never ran.
pub async fn remove(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    container: &ContainerSnapshot,
) {
    if session.heard().await {
        let pod_message = pod_message(server, pod);
        let message = message(pod, container).await;
        // One that was created and never ran has not been told as stopped: NRI's order has it so.
        let updates = session.stop(&pod_message, &message).await;
        carry_out(server, updates).await;
        session
            .tell(Event::RemoveContainer, &pod_message, Some(&message))
            .await;
    }
}

/// UpdateContainerResources: the wish as the plugins want it, after what they want of others is done.
pub async fn update(
    server: &Server,
    session: &Session,
    pod: &LiteBox,
    container: &ContainerSnapshot,
    wish: LinuxContainerResources,
) -> Result<LinuxContainerResources, Status> {
    if !session.heard().await {
        return Ok(wish);
    }
    let message = message(pod, container).await;
    let (wanted, others) = session
        .update(
            &pod_message(server, pod),
            &message,
            resources::from_cri(&wish),
            vcpus(pod),
        )
        .await
        .map_err(no)?;
    insist(server, others).await?;
    // What NRI has no field for stays as it was asked.
    let kept = wish;
    Ok(LinuxContainerResources {
        oom_score_adj: kept.oom_score_adj,
        hugepage_limits: kept.hugepage_limits,
        ..resources::cri(&wanted)
    })
}

fn vcpus(pod: &LiteBox) -> u32 {
    u32::from(pod.snapshot().options.vcpus)
}

/// Carries updates out; one that may not fail and does is an error.
async fn insist(server: &Server, updates: Vec<ContainerUpdate>) -> Result<(), Status> {
    let failed = carry_out(server, updates).await;
    match failed.first() {
        None => Ok(()),
        Some(update) => Err(Status::failed_precondition(format!(
            "NRI plugins want container {} updated, and that failed; the daemon's log has why",
            update.container_id
        ))),
    }
}

/// Carries updates out, each by itself; those that failed and may not come back.
async fn carry_out(server: &Server, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate> {
    let mut failed = Vec::new();
    for update in updates {
        let wanted = update
            .linux
            .as_ref()
            .and_then(|linux| linux.resources.clone())
            .unwrap_or_default();
        if let Err(status) = change(server, &update.container_id, &wanted).await {
            tracing::warn!(
                id = update.container_id,
                reason = status.message(),
                "an update of a plugin failed"
            );
            if !update.ignore_failure {
                failed.push(update);
            }
        }
    }
    failed
}

async fn change(server: &Server, id: &str, wanted: &LinuxResources) -> Result<(), Status> {
    let (pod, container) = server.runtime.find_container(id).map_err(refused)?;
    resources::refuse(wanted, vcpus(&pod))
        .map_err(|error| Status::failed_precondition(error.to_string()))?;
    let wish = resources::cri(wanted);
    let now = ContainerRecord::decoded(&container.metadata).resources();
    super::container_update::room(server, &pod).admit(&wish, now.as_ref())?;
    let json = resources::oci(wanted).to_string().into_bytes();
    let describe = Box::new(move |bytes: &[u8]| ContainerRecord::updated(bytes, &wish));
    pod.update_container(&container.id, json, describe)
        .await
        .map_err(refused)
}
