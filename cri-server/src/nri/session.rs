//! What a verb of the service does with the plugins: one event after the other, while the gate is held.
//!
//! Two kinds of events: those a plugin may refuse (RunPodSandbox, CreateContainer, StartContainer, UpdateContainer, UpdatePodSandbox) end at
//! the first refusal, which fails the call. Those that only tell (the Post ones, Stop, Remove) reach every plugin, and a refusal is said
//! in the log: what is ended is ended. What the answers come to is [`super::collect`]'s.

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

/// Why plugins keep a call from happening.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// One of them says no.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// What they want cannot be done.
    #[error(transparent)]
    Collect(#[from] CollectError),
    /// One does not like what the others adjusted.
    #[error("NRI plugin {plugin} rejects the adjustments: {reason}")]
    Rejected { plugin: String, reason: String },
}

/// Says why a plugin's limits for a new container are more than its VM has.
pub type Admit<'a> = dyn Fn(&LinuxResources) -> Result<(), String> + Send + Sync + 'a;

/// A verb's time with the plugins. No plugin becomes one while it lives: hold it from the event until what it is about can be seen.
#[derive(Debug)]
pub struct Session(Option<(Arc<Registry>, OwnedRwLockReadGuard<()>)>);

/// A pod's or container's event. Every such request has its pod as field 1 and its container as field 2, so one type stands for all.
fn subject(pod: &PodSandbox, container: Option<&Container>) -> StartContainerRequest {
    StartContainerRequest {
        pod: Some(pod.clone()),
        container: container.cloned(),
    }
}

impl Session {
    /// Of a runtime without plugins.
    pub(super) fn disabled() -> Self {
        Self(None)
    }

    pub(super) fn open(registry: Arc<Registry>, gate: OwnedRwLockReadGuard<()>) -> Self {
        Self(Some((registry, gate)))
    }

    fn registry(&self) -> Option<&Registry> {
        self.0.as_ref().map(|(registry, _)| &**registry)
    }

    /// Whether anybody listens: where nobody does, no message need be made.
    pub async fn has_plugins(&self) -> bool {
        match self.registry() {
            None => false,
            Some(registry) => !registry.plugins.lock().await.is_empty(),
        }
    }

    /// RunPodSandbox, StartContainer: the first refusal ends it.
    pub async fn request(
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

    /// Post events and Remove: everybody is told.
    pub async fn notify(&self, event: Event, pod: &PodSandbox, container: Option<&Container>) {
        let Some(registry) = self.registry() else {
            return;
        };
        let request = subject(pod, container);
        for plugin in registry.plugins.lock().await.iter() {
            let told = plugin.notify(event, &request, pod, container).await;
            log(told);
        }
    }

    /// StopPodSandbox, once for each pod.
    pub async fn stop_pod(&self, pod: &PodSandbox) {
        let Some(registry) = self.registry() else {
            return;
        };
        // Under the plugins' lock, so that who finds it told does not go ahead of it.
        let plugins = registry.plugins.lock().await;
        if !registry.stopped().insert(pod.id.clone()) {
            return;
        }
        let request = subject(pod, None);
        for plugin in plugins.iter() {
            let told = plugin
                .notify(Event::StopPodSandbox, &request, pod, None)
                .await;
            log(told);
        }
    }

    /// StopContainer, once for each container; what the plugins want of others comes back.
    pub async fn stop(&self, pod: &PodSandbox, container: &Container) -> Vec<ContainerUpdate> {
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
                            "updates are left out"
                        );
                    }
                }
                Ok(None) => {}
                Err(refusal) => log(Err(refusal)),
            }
        }
        updates.others(&container.id)
    }

    /// A pod or container is gone: its stop need not be remembered.
    pub fn forget(&self, id: &str) {
        if let Some(registry) = self.registry() {
            registry.stopped().remove(id);
        }
    }

    /// CreateContainer: what all plugins together want of the container, and of others.
    pub async fn create(
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

    /// UpdateContainer: the resources as the plugins want them, and what they want of others.
    pub async fn update(
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
                tracing::warn!(plugin = plugin.full_name(), "evictions are ignored");
            }
            updates.take(answer.update, &plugin.full_name())?;
            if let Some(wanted) = updates.of(&container.id) {
                super::resources::overlay(&mut resources, wanted);
            }
        }
        Ok((resources, updates.others(&container.id)))
    }

    /// UpdatePodSandbox: the first refusal ends it. Plugins older than the call have nothing against it.
    pub async fn update_pod(&self, request: &UpdatePodSandboxRequest) -> Result<(), SessionError> {
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

/// The limits that an answer sets.
fn resources_of(answer: &CreateContainerResponse) -> Option<LinuxResources> {
    answer.adjust.as_ref()?.linux.as_ref()?.resources.clone()
}

/// Asks those who validate adjustments; the first no counts. Without adjustment there is nothing to ask, but NRI asks all the same.
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
            // It was there to say no and did not get to it.
            None => {
                return Err(SessionError::Rejected {
                    plugin: plugin.full_name(),
                    reason: format!("it went away before it answered {}", method(event)),
                });
            }
        }
    }
    Ok(())
}

fn log(told: Result<(), Refusal>) {
    if let Err(refusal) = told {
        tracing::warn!(
            error = boxlite_runtime::report(&refusal),
            "a plugin's refusal changes nothing"
        );
    }
}
