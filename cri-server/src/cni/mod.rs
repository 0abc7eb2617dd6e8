//! Pod networks by CNI: `Cni` creates a network namespace, runs the configured plugins in it, and undoes both.
//!
//! It does not depend on VMs: the shim connects the plugin's interface to a tap. The undo record is on disk before the first
//! plugin runs, so `collect` finds everything that a killed daemon left behind at the next start.
//!
//! Flow: sandbox_run → `attach`; sandbox_stop and sandbox_remove → `detach`; status → `ready`; serve → `collect`.
//!
//! ```text
//!  attach:  record on disk → namespace → ADD, ADD, … → result on disk        failure: DEL …, namespace, record, in this order
//!  detach:  DEL in reverse order, end of the VM → namespace → record         repeatable; succeeds if already removed
//!  collect: detach of attachments without a pod, then GC, GC, … with the remaining ones
//! ```

mod attachment;
mod conf;
mod netns;
mod plugin;
mod record;
mod result;
#[cfg(test)]
mod tests;

pub(crate) use attachment::{Bandwidth, DnsSettings, PodNetwork, PortMap};
pub(crate) use conf::{ConfError, NetworkConf};
pub(crate) use plugin::PluginError;
pub(crate) use record::CniRecord;
pub(crate) use result::CniResult;

use crate::config::CniConfig;
use crate::layout::Layout;
use boxlite_runtime::failpoint;
use boxlite_sys::sync::Mutex;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Name of the pod's interface inside the namespace; the kubelet and every plugin expect it.
pub(crate) const INTERFACE: &str = "eth0";

/// Errors of a pod's network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CniError {
    /// No usable configuration.
    #[error(transparent)]
    Conf(#[from] ConfError),
    /// A plugin rejected the request, crashed or timed out.
    #[error("failed to run {command} of CNI plugin {plugin:?} for network {network:?}")]
    Plugin {
        network: String,
        command: &'static str,
        plugin: String,
        #[source]
        source: PluginError,
    },
    /// The plugins succeeded without assigning an address.
    #[error("network {network:?}: the plugins assigned no address to the pod")]
    NoAddress { network: String },
    /// The namespace could not be created or removed.
    #[error("failed to {step} network namespace {}", path.display())]
    Namespace {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The record on disk could not be written, read or removed.
    #[error("failed to {step} CNI record {}", path.display())]
    Record {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
}

impl CniError {
    /// Returns whether there is no configuration at all, rather than an invalid one.
    pub(crate) fn is_unconfigured(&self) -> bool {
        match self {
            Self::Conf(ConfError::Missing(_)) => true,
            Self::Conf(ConfError::Directory { source, .. }) => {
                source.kind() == std::io::ErrorKind::NotFound
            }
            _ => false,
        }
    }
}

/// Runs plugins. Cheap to clone: the state is on disk, and memory holds only the operations in progress.
#[derive(Debug, Clone)]
pub(crate) struct Cni {
    conf_dir: PathBuf,
    plugins: plugin::Plugins,
    records: PathBuf,
    namespaces: PathBuf,
    /// Sandboxes that are being detached.
    detaching: Arc<Mutex<HashMap<String, Weak<Gate>>>>,
}

/// Lock of a sandbox: one detach at a time.
type Gate = tokio::sync::Mutex<()>;

impl Cni {
    /// Creates an instance that owns the layout's CNI records and namespaces.
    pub(crate) fn new(config: &CniConfig, layout: &Layout) -> Self {
        Self {
            conf_dir: config.conf_dir.clone(),
            plugins: plugin::Plugins::new(config.bin_dirs.clone(), config.timeout),
            records: layout.cni_records(),
            namespaces: layout.namespaces(),
            detaching: Arc::default(),
        }
    }

    /// Returns an error if a pod could not get a network now (invalid configuration, missing plugin). Read on each call,
    /// so a changed directory is seen at once.
    pub(crate) fn ready(&self) -> Result<NetworkConf, CniError> {
        let conf = conf::load(&self.conf_dir)?;
        for plugin in &conf.plugins {
            self.plugins
                .find(&plugin.kind)
                .map_err(|source| CniError::Plugin {
                    network: conf.name.clone(),
                    command: "look-up",
                    plugin: plugin.kind.clone(),
                    source,
                })?;
        }
        Ok(conf)
    }

    /// Returns the path of the namespace of `sandbox`, whether or not it exists.
    pub(crate) fn namespace(&self, sandbox: &str) -> PathBuf {
        self.namespaces.join(sandbox)
    }

    /// Creates the namespace for a later [`Self::attach`] and returns its path. No plugin runs; `detach` removes it.
    pub(crate) async fn prepare(&self, sandbox: &str) -> Result<PathBuf, CniError> {
        let path = self.namespace(sandbox);
        netns::create(path.clone()).await?;
        Ok(path)
    }

    /// Creates the namespace, brings its loopback up and runs ADD of every plugin. On failure everything is undone.
    /// Dropping the future leaves the record, by which `detach` or `collect` cleans up.
    pub(crate) async fn attach(&self, pod: &PodNetwork) -> Result<CniRecord, CniError> {
        let conf = self.ready()?;
        let mut record = CniRecord::new(pod, conf, self.namespace(&pod.sandbox_id));
        self.point("network.record", &record.netns).await?;
        record.save(&self.records)?;
        match self.add_all(&mut record).await {
            Ok(()) => Ok(record),
            Err(error) => {
                if let Err(undo) = self.detach(&pod.sandbox_id).await {
                    tracing::warn!(sandbox = pod.sandbox_id, error = %boxlite_runtime::report(&undo), "failed to undo network of failed pod");
                }
                Err(error)
            }
        }
    }

    async fn add_all(&self, record: &mut CniRecord) -> Result<(), CniError> {
        self.point("network.namespace", &record.netns).await?;
        // The namespace of a warm VM exists already.
        if !netns::is_namespace(&record.netns) {
            netns::create(record.netns.clone()).await?;
        }
        self.point("network.add", &record.netns).await?;
        let mut previous = None;
        for plugin in &record.conf.plugins {
            let input = attachment::input(&record.conf, plugin, &record.pod, previous.as_ref());
            let output = self.run("ADD", record, &plugin.kind, &input).await?;
            let value = result::parse_value(&output).map_err(|source| CniError::Plugin {
                network: record.conf.name.clone(),
                command: "ADD",
                plugin: plugin.kind.clone(),
                source,
            })?;
            // A plugin that only adjusts something (tuning, bandwidth) may have no output.
            previous = value.or(previous);
        }
        let result = previous
            .as_ref()
            .map(CniResult::from_value)
            .unwrap_or_default();
        if result.addresses().next().is_none() {
            return Err(CniError::NoAddress {
                network: record.conf.name.clone(),
            });
        }
        record.result = previous;
        self.point("network.added", &record.netns).await?;
        record.save(&self.records)
    }

    /// Runs DEL of every plugin in reverse order, then removes namespace and record. Succeeds if they are already removed. If
    /// a plugin fails, the others still run, and the record remains so that the next call can retry. A concurrent call waits
    /// for the first: parallel DELs disturb each other (bridge fails on an interface that the other has just removed).
    pub(crate) async fn detach(&self, sandbox: &str) -> Result<(), CniError> {
        self.detach_while(sandbox, std::future::ready(true)).await
    }

    /// As [`Cni::detach`], while the pod's VM ends: the plugins do not wait for it. Namespace and record remain until `ended`
    /// returns, and for the next call if it returns false.
    pub(crate) async fn detach_while(
        &self,
        sandbox: &str,
        ended: impl Future<Output = bool>,
    ) -> Result<(), CniError> {
        let gate = self.gate(sandbox);
        let deleting = async {
            let alone = gate.lock().await;
            (self.delete(sandbox).await, alone)
        };
        let (ended, (deleted, _alone)) = tokio::join!(ended, deleting);
        deleted?;
        match ended {
            true => self.forget(sandbox).await,
            false => Ok(()),
        }
    }

    /// Runs DEL of every plugin in reverse order. Returns the first failure, after the others have run.
    async fn delete(&self, sandbox: &str) -> Result<(), CniError> {
        let Some(record) = CniRecord::load(&self.records, sandbox)? else {
            return Ok(());
        };
        self.point("network.del", &record.netns).await?;
        let mut failure = None;
        for plugin in record.conf.plugins.iter().rev() {
            let input =
                attachment::input(&record.conf, plugin, &record.pod, record.result.as_ref());
            if let Err(error) = self.run("DEL", &record, &plugin.kind, &input).await {
                tracing::warn!(sandbox, error = %boxlite_runtime::report(&error), "CNI DEL failed");
                failure.get_or_insert(error);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn gate(&self, sandbox: &str) -> Arc<Gate> {
        let mut gates = self.detaching.lock();
        gates.retain(|_, gate| gate.strong_count() > 0);
        if let Some(gate) = gates.get(sandbox).and_then(Weak::upgrade) {
            return gate;
        }
        let gate = Arc::new(Gate::default());
        gates.insert(sandbox.to_owned(), Arc::downgrade(&gate));
        gate
    }

    /// Runs CHECK of every plugin against the recorded result. Does nothing if the configuration is older than 0.4.0 or
    /// disables CHECK, or if there was no ADD.
    pub(crate) async fn check(&self, sandbox: &str) -> Result<(), CniError> {
        let Some(record) = CniRecord::load(&self.records, sandbox)? else {
            return Ok(());
        };
        let Some(result) = record.result.as_ref() else {
            return Ok(());
        };
        if record.conf.disable_check || !record.conf.at_least(0, 4) {
            return Ok(());
        }
        // None of them changes anything, so they need not wait for each other.
        let checks = record.conf.plugins.iter().map(|plugin| {
            let input = attachment::input(&record.conf, plugin, &record.pod, Some(result));
            let record = &record;
            async move { self.run("CHECK", record, &plugin.kind, &input).await }
        });
        let checked = futures::future::join_all(checks).await;
        checked.into_iter().try_for_each(|check| check.map(drop))
    }

    /// Returns the record of a sandbox's network, if it exists.
    #[cfg(test)]
    fn record(&self, sandbox: &str) -> Result<Option<CniRecord>, CniError> {
        CniRecord::load(&self.records, sandbox)
    }

    /// Removes records and namespaces that belong to no sandbox in `live`. Reads only this daemon's two directories, so
    /// another runtime on the node is not affected. Returns the number of removed networks, and those whose plugins failed,
    /// for [`Cni::release`]. Call it at the start only, because it removes unfinished records, too.
    pub(crate) async fn collect(&self, live: &HashSet<String>) -> (usize, HashSet<String>) {
        CniRecord::sweep(&self.records);
        let mut stale: HashSet<String> = CniRecord::names(&self.records).into_iter().collect();
        stale.extend(netns::names(&self.namespaces));
        stale.retain(|sandbox| !live.contains(sandbox));
        let found = stale.len();
        let left = self.release(stale).await;
        self.garbage(live).await;
        (found - left.len(), left)
    }

    /// Undoes the attachments of these removed sandboxes. Returns those that remain because a plugin failed.
    pub(crate) async fn release(&self, stale: HashSet<String>) -> HashSet<String> {
        let mut left = HashSet::new();
        for sandbox in stale {
            if let Err(error) = self.detach(&sandbox).await {
                tracing::warn!(
                    sandbox,
                    error = %boxlite_runtime::report(&error),
                    "failed to remove leaked network, retrying"
                );
                left.insert(sandbox);
            }
        }
        left
    }

    /// Retries [`Cni::release`]. A network whose ADD did not complete is abandoned if a plugin fails again: DEL fails on
    /// objects that the ADD had not created yet (bridge on its iptables chain), and would continue to fail.
    pub(crate) async fn release_again(&self, stale: HashSet<String>) -> HashSet<String> {
        let mut left = HashSet::new();
        for sandbox in self.release(stale).await {
            let unfinished = matches!(
                CniRecord::load(&self.records, &sandbox),
                Ok(Some(CniRecord { result: None, .. }))
            );
            if !unfinished || self.forget(&sandbox).await.is_err() {
                left.insert(sandbox);
            }
        }
        left
    }

    /// Removes namespace and record without running plugins.
    async fn forget(&self, sandbox: &str) -> Result<(), CniError> {
        let path = self.namespace(sandbox);
        self.point("network.forget", &path).await?;
        netns::remove(path.clone()).await?;
        self.point("network.forgotten", &path).await?;
        CniRecord::remove(&self.records, sandbox)
    }

    /// Runs GC of every plugin of the current network, so that they free resources that no pod uses, such as leases of a
    /// daemon whose records were lost. Requires protocol version 1.1.0; failures are logged only.
    async fn garbage(&self, live: &HashSet<String>) {
        let Ok(conf) = self.ready() else { return };
        if conf.disable_gc || !conf.at_least(1, 1) {
            return;
        }
        // Undecodable records are unknown networks: a GC without them might free their resources.
        let mut alive = Vec::new();
        for sandbox in CniRecord::names(&self.records) {
            match CniRecord::load(&self.records, &sandbox) {
                Ok(Some(record)) if record.conf.name == conf.name => alive.push(sandbox),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(sandbox, error = %boxlite_runtime::report(&error), "skipping CNI GC");
                    return;
                }
            }
        }
        alive.extend(
            live.iter()
                .filter(|s| !alive.contains(s))
                .cloned()
                .collect::<Vec<_>>(),
        );
        for plugin in &conf.plugins {
            let input = attachment::gc_input(&conf, plugin, &alive);
            let environment = [("CNI_COMMAND", "GC".to_owned())];
            if let Err(error) = self.plugins.run(&plugin.kind, &environment, &input).await {
                tracing::warn!(plugin = plugin.kind, error = %boxlite_runtime::report(&error), "CNI GC failed");
            }
        }
    }

    /// Marks a step for injected faults.
    async fn point(&self, name: &'static str, path: &Path) -> Result<(), CniError> {
        failpoint::reach(name)
            .await
            .map_err(|injected| CniError::Namespace {
                path: path.to_owned(),
                step: name,
                source: injected.into(),
            })
    }

    async fn run(
        &self,
        command: &'static str,
        record: &CniRecord,
        kind: &str,
        input: &serde_json::Value,
    ) -> Result<Vec<u8>, CniError> {
        // A reboot removes the namespace with /run. The protocol then requires an empty or missing CNI_NETNS, and plugins
        // still free their addresses.
        let netns = if command == "DEL" && !netns::is_namespace(&record.netns) {
            String::new()
        } else {
            record.netns.to_string_lossy().into_owned()
        };
        let environment = attachment::environment(command, &record.pod, &netns);
        self.plugins
            .run(kind, &environment, input)
            .await
            .map_err(|source| CniError::Plugin {
                network: record.conf.name.clone(),
                command,
                plugin: kind.to_owned(),
                source,
            })
    }
}
