//! The pods' networks by CNI: `Cni` makes a network namespace, runs the configured plugins in it and undoes both.
//!
//! It knows nothing of VMs: the shim joins the plugin's interface to a tap. The undo record is on disk before the first
//! plugin runs, so a daemon that dies at any line leaves nothing that `collect` (at start) does not find.
//!
//! Flow: sandbox_run → `attach`; sandbox_stop and sandbox_remove → `detach`; status → `ready`; serve → `collect`.
//!
//! ```text
//!  attach:  record on disk → namespace → ADD, ADD, … → result on disk        failure: DEL …, namespace, record, in this order
//!  detach:  DEL in reverse order → namespace → record                        repeatable; succeeds if already removed
//!  collect: detach of attachments without a pod, then GC, GC, … with the rest
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
pub(crate) use record::Record;
pub(crate) use result::CniResult;

use crate::config::CniConfig;
use crate::layout::Layout;
use boxlite_sys::sync::Mutex;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Weak};

/// The pod's interface inside the namespace; the kubelet and every plugin expect this name.
pub(crate) const INTERFACE: &str = "eth0";

/// Errors of a pod's network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CniError {
    /// There is no usable configuration.
    #[error(transparent)]
    Conf(#[from] ConfError),
    /// A plugin refused, broke or hung.
    #[error("network {network:?}: {command} by plugin {plugin:?} failed")]
    Plugin {
        network: String,
        command: &'static str,
        plugin: String,
        #[source]
        source: PluginError,
    },
    /// The plugins succeeded and gave no address.
    #[error("network {network:?}: the plugins gave the pod no address")]
    NoAddress { network: String },
    /// The namespace could not be made or removed.
    #[error("network namespace {}: {step} failed", path.display())]
    Namespace {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The record on disk could not be written, read or removed.
    #[error("CNI record {}: {step} failed", path.display())]
    Record {
        path: PathBuf,
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// Runs plugins. Cheap to clone; the state is on disk, memory holds only the operations in progress.
#[derive(Debug, Clone)]
pub(crate) struct Cni {
    conf_dir: PathBuf,
    plugins: plugin::Plugins,
    records: PathBuf,
    namespaces: PathBuf,
    /// Sandboxes that are being detached.
    detaching: Arc<Mutex<HashMap<String, Weak<Gate>>>>,
}

/// One detaching of a sandbox at a time.
type Gate = tokio::sync::Mutex<()>;

impl Cni {
    /// The layout's CNI records and namespaces are this module's.
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

    /// Makes the namespace, brings its loopback up and runs ADD of every plugin. On failure everything is undone.
    /// Dropping the future leaves the record, which `detach` or `collect` works off.
    pub(crate) async fn attach(&self, pod: &PodNetwork) -> Result<Record, CniError> {
        let conf = self.ready()?;
        let mut record = Record::new(pod, conf, self.namespace(&pod.sandbox_id));
        record.save(&self.records)?;
        match self.add_all(&mut record).await {
            Ok(()) => Ok(record),
            Err(error) => {
                if let Err(undo) = self.detach(&pod.sandbox_id).await {
                    tracing::warn!(sandbox = pod.sandbox_id, error = %boxlite_runtime::report(&undo), "network not fully undone");
                }
                Err(error)
            }
        }
    }

    async fn add_all(&self, record: &mut Record) -> Result<(), CniError> {
        netns::create(record.netns.clone()).await?;
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
            // A plugin that only adjusts something (tuning, bandwidth) may answer nothing.
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
        record.save(&self.records)
    }

    /// Runs DEL of every plugin in reverse order, then removes namespace and record. Succeeds if they are already removed. When a
    /// plugin fails the others still run, and the record stays so that the next call tries again. A second call beside the
    /// first waits for it: two DELs at once trip over each other (bridge on an interface that has just gone).
    pub(crate) async fn detach(&self, sandbox: &str) -> Result<(), CniError> {
        let gate = self.gate(sandbox);
        let _alone = gate.lock().await;
        let Some(record) = Record::load(&self.records, sandbox)? else {
            return netns::remove(self.namespace(sandbox)).await;
        };
        let mut failure = None;
        for plugin in record.conf.plugins.iter().rev() {
            let input =
                attachment::input(&record.conf, plugin, &record.pod, record.result.as_ref());
            if let Err(error) = self.run("DEL", &record, &plugin.kind, &input).await {
                tracing::warn!(sandbox, error = %boxlite_runtime::report(&error), "CNI DEL failed");
                failure.get_or_insert(error);
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        self.forget(sandbox).await
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

    /// Runs CHECK of every plugin against the recorded result. Nothing to check where the configuration is older than
    /// 0.4.0, switched it off, or there was no ADD.
    pub(crate) async fn check(&self, sandbox: &str) -> Result<(), CniError> {
        let Some(record) = Record::load(&self.records, sandbox)? else {
            return Ok(());
        };
        let Some(result) = record.result.as_ref() else {
            return Ok(());
        };
        if record.conf.disable_check || !record.conf.at_least(0, 4) {
            return Ok(());
        }
        for plugin in &record.conf.plugins {
            let input = attachment::input(&record.conf, plugin, &record.pod, Some(result));
            self.run("CHECK", &record, &plugin.kind, &input).await?;
        }
        Ok(())
    }

    /// The record of a sandbox's network, if there is one.
    #[cfg(test)]
    fn record(&self, sandbox: &str) -> Result<Option<Record>, CniError> {
        Record::load(&self.records, sandbox)
    }

    /// Undoes records and namespaces that belong to no sandbox in `live`. Only this daemon's own are
    /// looked at (its two directories), so nothing of another runtime on the node is touched. Returns how many went, and
    /// those whose plugins failed, for [`Cni::release`]. At start only: drafts of records go too.
    pub(crate) async fn collect(&self, live: &HashSet<String>) -> (usize, HashSet<String>) {
        Record::sweep(&self.records);
        let mut stale: HashSet<String> = Record::names(&self.records).into_iter().collect();
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
                    "leaked network could not be removed; it is tried again"
                );
                left.insert(sandbox);
            }
        }
        left
    }

    /// [`Cni::release`] once more. A network whose ADD never came to its end is given up where a plugin refuses again: it
    /// fails on objects that the ADD had not created yet (bridge on its iptables chain), and would fail forever.
    pub(crate) async fn release_again(&self, stale: HashSet<String>) -> HashSet<String> {
        let mut left = HashSet::new();
        for sandbox in self.release(stale).await {
            let unfinished = matches!(
                Record::load(&self.records, &sandbox),
                Ok(Some(Record { result: None, .. }))
            );
            if !unfinished || self.forget(&sandbox).await.is_err() {
                left.insert(sandbox);
            }
        }
        left
    }

    /// Removes namespace and record without asking plugins.
    async fn forget(&self, sandbox: &str) -> Result<(), CniError> {
        netns::remove(self.namespace(sandbox)).await?;
        Record::remove(&self.records, sandbox)
    }

    /// Runs GC of every plugin of the present network, so that they free resources that no pod uses: leases of a daemon
    /// whose records were lost, for one. From protocol version 1.1.0 on; failures are logged only.
    async fn garbage(&self, live: &HashSet<String>) {
        let Ok(conf) = self.ready() else { return };
        if conf.disable_gc || !conf.at_least(1, 1) {
            return;
        }
        // Undecodable records are unknown networks: a GC without them might free their resources.
        let mut alive = Vec::new();
        for sandbox in Record::names(&self.records) {
            match Record::load(&self.records, &sandbox) {
                Ok(Some(record)) if record.conf.name == conf.name => alive.push(sandbox),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(sandbox, error = %boxlite_runtime::report(&error), "no CNI GC");
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

    async fn run(
        &self,
        command: &'static str,
        record: &Record,
        kind: &str,
        input: &serde_json::Value,
    ) -> Result<Vec<u8>, CniError> {
        // After a reboot the namespace is gone with /run; the protocol wants an empty or missing CNI_NETNS then, and
        // plugins still free their addresses.
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
