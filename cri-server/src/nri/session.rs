//! Events of one RPC, sent while the gate is held.
//!
//! There are two kinds of events. Those that plugins may reject (RunPodSandbox, CreateContainer, StartContainer,
//! UpdateContainer, UpdatePodSandbox) stop at the first rejection, which fails the call. Notifications (Post events,
//! Stop, Remove) reach every plugin, and a rejection is logged. Answers are merged in [`super::collect`].

use super::Registry;
use super::collect::{CollectError, Creation, Updates};
use super::plugin::{Plugin, Refusal, method};
use boxlite_proto::nri::v1alpha1::{
    Container, ContainerAdjustment, ContainerUpdate, CreateContainerRequest,
    CreateContainerResponse, Event, LinuxResources, PluginInstance, PodSandbox,
    StartContainerRequest, StopContainerResponse, UpdateContainerRequest, UpdateContainerResponse,
    UpdatePodSandboxRequest, UpdatePodSandboxResponse, ValidateContainerAdjustmentRequest,
    ValidateContainerAdjustmentResponse,
};
use std::sync::Arc;
use tokio::sync::OwnedRwLockReadGuard;

/// Reason why plugins prevent a call.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// A plugin rejected the event.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The requested adjustments cannot be applied.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// A validating plugin rejected the adjustments.
    #[error("NRI plugin {plugin} rejected the adjustments: {reason}")]
    Rejected { plugin: String, reason: String },
}

/// Returns an error if a plugin's limits for a new container exceed its VM.
pub(crate) type Admit<'a> = dyn Fn(&LinuxResources) -> Result<(), String> + Send + Sync + 'a;

/// Session of an RPC. No plugin is added while it exists: hold it from the event until its change is visible.
#[derive(Debug)]
pub(crate) struct Session(Option<(Arc<Registry>, OwnedRwLockReadGuard<()>)>);

/// Event of a pod or container. All these requests have the pod as field 1 and the container as field 2, so one type
/// represents all.
fn subject(pod: &PodSandbox, container: Option<&Container>) -> StartContainerRequest {
    StartContainerRequest {
        pod: Some(pod.clone()),
        container: container.cloned(),
    }
}

impl Session {
    /// Returns the session of a disabled NRI.
    pub(super) fn disabled() -> Self {
        Self(None)
    }

    pub(super) fn open(registry: Arc<Registry>, gate: OwnedRwLockReadGuard<()>) -> Self {
        Self(Some((registry, gate)))
    }

    fn registry(&self) -> Option<&Registry> {
        self.0.as_ref().map(|(registry, _)| &**registry)
    }

    /// Returns whether a plugin is registered; if not, no message needs to be built.
    pub(crate) async fn has_plugins(&self) -> bool {
        match self.registry() {
            None => false,
            Some(registry) => !registry.plugins.lock().await.is_empty(),
        }
    }

    /// Sends RunPodSandbox or StartContainer; stops at the first rejection.
    pub(crate) async fn request(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), SessionError> {
        let Some(registry) = self.registry() else {
            return Ok(());
        };
        let request = subject(pod, container);
        for plugin in registry.plugins.lock().await.iter() {
            plugin.notify(event, &request, pod, container).await?;
        }
        Ok(())
    }

    /// Sends a Post event or a Remove to all plugins.
    pub(crate) async fn notify(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) {
        let Some(registry) = self.registry() else {
            return;
        };
        let request = subject(pod, container);
        for plugin in registry.plugins.lock().await.iter() {
            let outcome = plugin.notify(event, &request, pod, container).await;
            log(outcome);
        }
    }

    /// Sends StopPodSandbox, once per pod.
    pub(crate) async fn stop_pod(&self, pod: &PodSandbox) {
        let Some(registry) = self.registry() else {
            return;
        };
        // Under the lock of the plugins, so that a caller that finds it reported does not overtake it.
        let plugins = registry.plugins.lock().await;
        if !registry.stopped().insert(pod.id.clone()) {
            return;
        }
        let request = subject(pod, None);
        for plugin in plugins.iter() {
            let outcome = plugin
                .notify(Event::StopPodSandbox, &request, pod, None)
                .await;
            log(outcome);
        }
    }

    /// Sends StopContainer, once per container; returns the updates of other containers.
    pub(crate) async fn stop(
        &self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Vec<ContainerUpdate> {
        let Some(registry) = self.registry() else {
            return Vec::new();
        };
        let plugins = registry.plugins.lock().await;
        if !registry.stopped().insert(container.id.clone()) {
            return Vec::new();
        }
        let request = subject(pod, Some(container));
        let mut updates = Updates::default();
        for plugin in plugins.iter() {
            match plugin
                .call::<StopContainerResponse>(Event::StopContainer, &request)
                .await
            {
                Ok(Some(answer)) => {
                    if let Err(error) = updates.take(answer.update, &plugin.full_name()) {
                        tracing::warn!(
                            error = boxlite_runtime::report(&error),
                            "skipping updates of NRI plugin"
                        );
                    }
                }
                Ok(None) => {}
                Err(refusal) => log(Err(refusal)),
            }
        }
        updates.others(&container.id)
    }

    /// Removes the stop mark of a deleted pod or container.
    pub(crate) fn forget(&self, id: &str) {
        if let Some(registry) = self.registry() {
            registry.stopped().remove(id);
        }
    }

    /// Sends CreateContainer; returns the merged adjustment and the updates of other containers.
    pub(crate) async fn create(
        &self,
        pod: &PodSandbox,
        container: Container,
        vcpus: u32,
        admit: &Admit<'_>,
    ) -> Result<(ContainerAdjustment, Vec<ContainerUpdate>), SessionError> {
        let Some(registry) = self.registry() else {
            return Ok(Default::default());
        };
        let pristine = container.clone();
        let mut creation = Creation::new(container, vcpus);
        let plugins = registry.plugins.lock().await;
        for plugin in plugins.iter() {
            let request = CreateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(creation.container.clone()),
            };
            let answer: Option<CreateContainerResponse> =
                plugin.call(Event::CreateContainer, &request).await?;
            if let Some(answer) = answer {
                let wanted = resources_of(&answer);
                creation.take(answer, &plugin.full_name())?;
                if let Some(Err(reason)) = wanted.map(|wanted| admit(&wanted)) {
                    return Err(CollectError::beyond(&plugin.full_name(), reason).into());
                }
            }
        }
        validate(&plugins, pod, pristine, &creation).await?;
        Ok(creation.into_parts())
    }

    /// Sends UpdateContainer; returns the resources with the plugins' changes, and the updates of other containers.
    pub(crate) async fn update(
        &self,
        pod: &PodSandbox,
        container: &Container,
        mut resources: LinuxResources,
        vcpus: u32,
    ) -> Result<(LinuxResources, Vec<ContainerUpdate>), SessionError> {
        let Some(registry) = self.registry() else {
            return Ok((resources, Vec::new()));
        };
        let mut updates = Updates::default().with_vcpus(&container.id, vcpus);
        for plugin in registry.plugins.lock().await.iter() {
            let request = UpdateContainerRequest {
                pod: Some(pod.clone()),
                container: Some(container.clone()),
                linux_resources: Some(resources.clone()),
            };
            let answer: Option<UpdateContainerResponse> =
                plugin.call(Event::UpdateContainer, &request).await?;
            let Some(answer) = answer else { continue };
            if !answer.evict.is_empty() {
                tracing::warn!(
                    plugin = plugin.full_name(),
                    "ignoring evictions requested by NRI plugin"
                );
            }
            updates.take(answer.update, &plugin.full_name())?;
            if let Some(wanted) = updates.of(&container.id) {
                super::resources::overlay(&mut resources, wanted);
            }
        }
        Ok((resources, updates.others(&container.id)))
    }

    /// Sends UpdatePodSandbox; stops at the first rejection. Plugins that do not implement it consent.
    pub(crate) async fn update_pod(
        &self,
        request: &UpdatePodSandboxRequest,
    ) -> Result<(), SessionError> {
        let Some(registry) = self.registry() else {
            return Ok(());
        };
        let event = Event::UpdatePodSandbox;
        for plugin in registry.plugins.lock().await.iter() {
            if plugin.wants(event) && !plugin.is_closed() {
                let _: Option<UpdatePodSandboxResponse> =
                    plugin.call_or_default(event, request).await?;
            }
        }
        Ok(())
    }
}

/// Returns the resources that an answer sets.
fn resources_of(answer: &CreateContainerResponse) -> Option<LinuxResources> {
    answer.adjust.as_ref()?.linux.as_ref()?.resources.clone()
}

/// Sends the adjustments to validating plugins; the first rejection fails the call. As NRI specifies, also without
/// adjustments.
async fn validate(
    plugins: &[Arc<Plugin>],
    pod: &PodSandbox,
    container: Container,
    creation: &Creation,
) -> Result<(), SessionError> {
    let event = Event::ValidateContainerAdjustment;
    let mut validators = plugins.to_vec();
    validators.retain(|plugin| plugin.wants(event) && !plugin.is_closed());
    if validators.is_empty() {
        return Ok(());
    }
    let instance = |plugin: &Arc<Plugin>| PluginInstance {
        name: plugin.name().to_owned(),
        index: plugin.index().to_owned(),
    };
    let request = ValidateContainerAdjustmentRequest {
        pod: Some(pod.clone()),
        container: Some(container),
        adjust: Some(creation.adjust.clone()),
        update: creation.updates().to_vec(),
        owners: Some(creation.owners()),
        plugins: plugins.iter().map(instance).collect(),
    };
    for plugin in validators {
        let answer: Option<ValidateContainerAdjustmentResponse> =
            plugin.call_or_default(event, &request).await?;
        match answer {
            Some(answer) if answer.reject => {
                return Err(SessionError::Rejected {
                    plugin: plugin.full_name(),
                    reason: answer.reason,
                });
            }
            Some(_) => {}
            // A validator that could not answer counts as a rejection.
            None => {
                return Err(SessionError::Rejected {
                    plugin: plugin.full_name(),
                    reason: format!("disconnected before it answered {}", method(event)),
                });
            }
        }
    }
    Ok(())
}

fn log(outcome: Result<(), Refusal>) {
    if let Err(refusal) = outcome {
        tracing::warn!(
            error = boxlite_runtime::report(&refusal),
            "ignoring rejection of a notification"
        );
    }
}
