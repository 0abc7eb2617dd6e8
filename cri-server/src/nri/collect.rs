//! Merges the answers of several plugins to one event, in order; a contradiction is an error.
//!
//! A later plugin sees the container with the earlier adjustments. The functions are pure: the calls are in
//! [`super`], the validation in [`super::adjust`].

use super::adjust::{self, name_of, unmarked};
use super::owners::{Conflict, Owners};
use super::resources;
use super::unsupported::Unsupported;
use boxlite_proto::nri::v1alpha1::{
    Container, ContainerAdjustment, ContainerUpdate, CreateContainerResponse, Field, KeyValue,
    LinuxContainerAdjustment, LinuxContainerUpdate, LinuxDevice, LinuxResources, Mount,
    OwningPlugins,
};
use std::collections::{HashMap, HashSet};

/// Reason why the plugins' answers cannot be merged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CollectError {
    /// Two plugins set the same field.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// An adjustment that a VM cannot provide.
    #[error("invalid adjustment of NRI plugin {plugin}: {refused}")]
    Unsupported {
        plugin: String,
        refused: Unsupported,
    },
    /// A plugin updates the container that is being created, instead of adjusting it.
    #[error("NRI plugin {plugin} updates container {container} while it is being created")]
    Early { plugin: String, container: String },
}

impl CollectError {
    /// Creates the error for limits beyond the VM's capacity; `reason` has the figures.
    pub(crate) fn beyond(plugin: &str, reason: String) -> Self {
        let field = "linux.resources".to_owned();
        Self::Unsupported {
            plugin: plugin.to_owned(),
            refused: Unsupported { field, reason },
        }
    }
}

/// Merged answers to CreateContainer.
#[derive(Debug)]
pub(crate) struct Creation {
    /// The container with the adjustments so far.
    pub container: Container,
    /// The adjustments so far.
    pub adjust: ContainerAdjustment,
    updates: Updates,
}

/// Container updates, at most one per container, merged from all plugins.
#[derive(Debug, Default)]
pub(crate) struct Updates {
    owners: Owners,
    list: Vec<ContainerUpdate>,
    /// Number of vCPUs of each pod's VM, by container. A missing entry is checked when the update is applied.
    vcpus: HashMap<String, u32>,
}

impl Updates {
    /// Merges the updates of one plugin. A conflicting update with `ignore_failure` is skipped.
    pub(crate) fn take(
        &mut self,
        updates: Vec<ContainerUpdate>,
        plugin: &str,
    ) -> Result<(), CollectError> {
        for update in updates {
            let lenient = update.ignore_failure;
            match self.take_one(update, plugin) {
                Err(error) if lenient => {
                    tracing::warn!(
                        plugin,
                        error = boxlite_runtime::report(&error),
                        "skipping conflicting update that may fail"
                    );
                }
                result => result?,
            }
        }
        Ok(())
    }

    fn take_one(&mut self, update: ContainerUpdate, plugin: &str) -> Result<(), CollectError> {
        let Some(wanted) = update.linux.and_then(|linux| linux.resources) else {
            return Ok(());
        };
        let id = update.container_id;
        let vcpus = self.vcpus.get(&id).copied().unwrap_or(u32::MAX);
        resources::check(&wanted, vcpus).map_err(|refused| CollectError::Unsupported {
            plugin: plugin.to_owned(),
            refused,
        })?;
        for (field, key) in resources::fields(&wanted) {
            self.owners.claim(&id, field, &key, plugin)?;
        }
        match self.list.iter_mut().find(|have| have.container_id == id) {
            Some(have) => {
                have.ignore_failure &= update.ignore_failure;
                let linux = have.linux.get_or_insert_default();
                resources::overlay(linux.resources.get_or_insert_default(), &wanted);
            }
            None => self.list.push(ContainerUpdate {
                container_id: id,
                linux: Some(LinuxContainerUpdate {
                    resources: Some(wanted),
                }),
                ignore_failure: update.ignore_failure,
            }),
        }
        Ok(())
    }

    /// Returns the resources requested for a container so far.
    pub(crate) fn of(&self, container: &str) -> Option<&LinuxResources> {
        let update = self.list.iter().find(|u| u.container_id == container)?;
        update.linux.as_ref()?.resources.as_ref()
    }

    /// Sets the number of vCPUs of a container's VM.
    pub(crate) fn with_vcpus(mut self, container: &str, vcpus: u32) -> Self {
        self.vcpus.insert(container.to_owned(), vcpus);
        self
    }

    /// Returns all updates but those of `except`.
    pub(crate) fn others(self, except: &str) -> Vec<ContainerUpdate> {
        let mut list = self.list;
        list.retain(|update| update.container_id != except);
        list
    }

    /// Returns the updates for validating plugins.
    pub(crate) fn list(&self) -> &[ContainerUpdate] {
        &self.list
    }
}

impl Creation {
    /// Starts with no adjustment. `vcpus` is the number of vCPUs of the pod's VM.
    pub(crate) fn new(container: Container, vcpus: u32) -> Self {
        let updates = Updates::default().with_vcpus(&container.id, vcpus);
        Self {
            container,
            adjust: ContainerAdjustment::default(),
            updates,
        }
    }

    /// Merges the answer of one plugin.
    pub(crate) fn take(
        &mut self,
        answer: CreateContainerResponse,
        plugin: &str,
    ) -> Result<(), CollectError> {
        if let Some(adjust) = answer.adjust {
            let vcpus = self.updates.vcpus.get(&self.container.id).copied();
            adjust::check(&adjust, vcpus.unwrap_or(u32::MAX)).map_err(|refused| {
                CollectError::Unsupported {
                    plugin: plugin.to_owned(),
                    refused,
                }
            })?;
            self.adjust(adjust, plugin)?;
        }
        let own = |update: &ContainerUpdate| update.container_id == self.container.id;
        if answer.update.iter().any(own) {
            return Err(CollectError::Early {
                plugin: plugin.to_owned(),
                container: self.container.id.clone(),
            });
        }
        if !answer.evict.is_empty() {
            tracing::warn!(plugin, "ignoring evictions requested by NRI plugin");
        }
        self.updates.take(answer.update, plugin)
    }

    /// Returns the owner of each field.
    pub(crate) fn owners(&self) -> OwningPlugins {
        self.updates.owners.message()
    }

    /// Returns the updates of other containers so far.
    pub(crate) fn updates(&self) -> &[ContainerUpdate] {
        self.updates.list()
    }

    /// Returns the adjustment and the updates of other containers.
    pub(crate) fn into_parts(self) -> (ContainerAdjustment, Vec<ContainerUpdate>) {
        (self.adjust, self.updates.list)
    }

    fn adjust(&mut self, wanted: ContainerAdjustment, plugin: &str) -> Result<(), Conflict> {
        let mut claims = Claims {
            owners: &mut self.updates.owners,
            container: &self.container.id.clone(),
            plugin,
        };
        let (container, adjust) = (&mut self.container, &mut self.adjust);
        claims.map(
            Field::Annotations,
            wanted.annotations,
            &mut container.annotations,
            &mut adjust.annotations,
        )?;
        claims.list(
            Field::Mounts,
            wanted.mounts,
            &mut container.mounts,
            &mut adjust.mounts,
        )?;
        let mut environment: Vec<KeyValue> =
            container.env.iter().map(|entry| pair(entry)).collect();
        claims.list(Field::Env, wanted.env, &mut environment, &mut adjust.env)?;
        container.env = environment
            .iter()
            .map(|entry| format!("{}={}", entry.key, entry.value))
            .collect();
        if !wanted.args.is_empty() {
            let mut args = wanted.args;
            if args[0].is_empty() {
                claims
                    .owners
                    .clear(claims.container, Field::Args, "", plugin);
                args.remove(0);
            }
            claims.one(Field::Args, "")?;
            container.args.clone_from(&args);
            adjust.args = args;
        }
        for limit in wanted.rlimits {
            claims.one(Field::Rlimits, &limit.r#type)?;
            container.rlimits.retain(|have| have.r#type != limit.r#type);
            container.rlimits.push(limit.clone());
            adjust.rlimits.push(limit);
        }
        match wanted.linux {
            Some(linux) => claims.linux(linux, container, adjust),
            None => Ok(()),
        }
    }
}

/// A list entry with a name.
trait Named: Clone {
    fn name(&self) -> &str;
    /// Returns an entry that only removes `name`.
    fn removal(name: &str) -> Self;
}

impl Named for Mount {
    fn name(&self) -> &str {
        &self.destination
    }

    fn removal(name: &str) -> Self {
        Self {
            destination: format!("-{name}"),
            ..Self::default()
        }
    }
}

impl Named for KeyValue {
    fn name(&self) -> &str {
        &self.key
    }

    fn removal(name: &str) -> Self {
        Self {
            key: format!("-{name}"),
            ..Self::default()
        }
    }
}

impl Named for LinuxDevice {
    fn name(&self) -> &str {
        &self.path
    }

    fn removal(name: &str) -> Self {
        Self {
            path: format!("-{name}"),
            ..Self::default()
        }
    }
}

fn pair(entry: &str) -> KeyValue {
    let key = name_of(entry);
    KeyValue {
        key: key.to_owned(),
        value: entry.get(key.len() + 1..).unwrap_or_default().to_owned(),
    }
}

/// Claims of one plugin on one container.
struct Claims<'a> {
    owners: &'a mut Owners,
    container: &'a str,
    plugin: &'a str,
}

impl Claims<'_> {
    fn one(&mut self, field: Field, key: &str) -> Result<(), Conflict> {
        self.owners.claim(self.container, field, key, self.plugin)
    }

    /// Removes and sets entries of a list, in the container and in the adjustment.
    fn list<T: Named>(
        &mut self,
        field: Field,
        wanted: Vec<T>,
        container: &mut Vec<T>,
        adjust: &mut Vec<T>,
    ) -> Result<(), Conflict> {
        let (gone, set): (Vec<T>, Vec<T>) = wanted
            .into_iter()
            .partition(|entry| unmarked(entry.name()).1);
        let gone: HashSet<String> = gone
            .iter()
            .map(|entry| unmarked(entry.name()).0.to_owned())
            .collect();
        for name in &gone {
            self.owners.clear(self.container, field, name, self.plugin);
            adjust.retain(|entry| unmarked(entry.name()).0 != name);
            adjust.push(T::removal(name));
        }
        let replaced: HashSet<&str> = set.iter().map(Named::name).collect();
        container.retain(|entry| !gone.contains(entry.name()) && !replaced.contains(entry.name()));
        for entry in &set {
            self.one(field, entry.name())?;
        }
        adjust.extend(set.iter().cloned());
        container.extend(set);
        Ok(())
    }

    /// Removes and sets entries of a map, in the container and in the adjustment.
    fn map(
        &mut self,
        field: Field,
        wanted: HashMap<String, String>,
        container: &mut HashMap<String, String>,
        adjust: &mut HashMap<String, String>,
    ) -> Result<(), Conflict> {
        let (gone, set): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|(key, _)| unmarked(key).1);
        for (key, _) in gone {
            let name = unmarked(&key).0;
            self.owners.clear(self.container, field, name, self.plugin);
            container.remove(name);
            adjust.remove(name);
            adjust.insert(key, String::new());
        }
        for (key, value) in set {
            self.one(field, &key)?;
            container.insert(key.clone(), value.clone());
            adjust.insert(key, value);
        }
        Ok(())
    }

    fn linux(
        &mut self,
        wanted: LinuxContainerAdjustment,
        container: &mut Container,
        adjust: &mut ContainerAdjustment,
    ) -> Result<(), Conflict> {
        let container = container.linux.get_or_insert_default();
        let adjust = adjust.linux.get_or_insert_default();
        self.list(
            Field::Devices,
            wanted.devices,
            &mut container.devices,
            &mut adjust.devices,
        )?;
        self.map(
            Field::Sysctl,
            wanted.sysctl,
            &mut container.sysctl,
            &mut adjust.sysctl,
        )?;
        if let Some(wanted) = wanted.resources {
            for (field, key) in resources::fields(&wanted) {
                self.one(field, &key)?;
            }
            for into in [&mut container.resources, &mut adjust.resources] {
                resources::overlay(into.get_or_insert_default(), &wanted);
            }
        }
        if wanted.oom_score_adj.is_some() {
            self.one(Field::OomScoreAdj, "")?;
            container.oom_score_adj = wanted.oom_score_adj;
            adjust.oom_score_adj = wanted.oom_score_adj;
        }
        if !wanted.cgroups_path.is_empty() {
            self.one(Field::CgroupsPath, "")?;
            adjust.cgroups_path = wanted.cgroups_path;
        }
        Ok(())
    }
}
