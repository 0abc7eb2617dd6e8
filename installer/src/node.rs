//! [`Installer`]: the steps on one node. Installs, waits for the handler, labels; and the reverse.
//!
//! The label is the last step of an installation and the first one of a removal, so that the scheduler places no pod of the
//! RuntimeClass on a node that cannot run it.

use crate::error::{InstallError, Result};
use crate::files;
use crate::host::Host;
use crate::kube::{Change, Cluster, EventKind, NodeInfo};
use crate::runtime::{CONTAINERD_CONFIG, NodeRuntime, below};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// State directory of the shims under containerd, which boxlite-cri has, too.
const STATE_DIR: &str = "/run/boxlite";

/// Settings of an installation.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Settings {
    /// Name of the node.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Name of the runtime handler.
    #[arg(long, default_value = "boxlite")]
    pub handler: String,
    /// Directory of all installed files on the node.
    #[arg(long, default_value = "/opt/boxlite")]
    pub prefix: PathBuf,
    /// Directory of the programs in this image.
    #[arg(long, default_value = "/payload")]
    pub payload: PathBuf,
    /// Root directory of the node.
    #[arg(long, default_value = "/proc/1/root")]
    pub root: PathBuf,
    /// Container runtime; detected if absent.
    #[arg(long, value_enum)]
    pub runtime: Option<NodeRuntime>,
    /// containerd's configuration on the node, if its runtime is containerd.
    #[arg(long, default_value = CONTAINERD_CONFIG)]
    pub containerd_config: PathBuf,
    /// Command that restarts the runtime, one word per option; depends on the runtime if absent.
    #[arg(long = "restart", allow_hyphen_values = true)]
    pub restart: Vec<String>,
    /// Lines of the shim's configuration, shim.toml.
    #[arg(long, env = "BOXLITE_SHIM_TOML", default_value = "")]
    pub shim_toml: String,
    /// Seconds for the node to report the handler, and for pods to end before a removal.
    #[arg(long, default_value_t = 180)]
    pub timeout_seconds: u64,
    /// Milliseconds between two looks at the node.
    #[arg(long, default_value_t = 2000)]
    pub poll_ms: u64,
}

/// Installation on one node.
pub(crate) struct Installer<'a, C, H> {
    pub settings: &'a Settings,
    pub cluster: &'a C,
    pub host: &'a H,
}

impl<C: Cluster, H: Host> Installer<'_, C, H> {
    /// Installs, and labels the node when it reports the handler. Repeating it changes nothing.
    pub(crate) async fn install(&self) -> Result<()> {
        let node = self.node().await?;
        let result = self.install_steps(&node).await;
        match &result {
            Ok(true) => {
                let message = format!("runtime handler {} installed", self.settings.handler);
                self.event(&node, EventKind::Installed, &message).await;
            }
            Ok(false) => {}
            Err(error) => {
                let message = boxlite_sys::report::report(error);
                self.event(&node, EventKind::InstallFailed, &message).await;
                let failed = [Change::Label(None), Change::State(Some("failed"))];
                self.cluster.change(&self.settings.node, &failed).await?;
            }
        }
        result.map(drop)
    }

    /// Returns whether anything changed.
    async fn install_steps(&self, node: &NodeInfo) -> Result<bool> {
        let settings = self.settings;
        if node.state.as_deref() != Some("ready") {
            self.change(&[Change::State(Some("installing"))]).await?;
        }
        let runtime = self.runtime(node)?;
        let files = files::install(&settings.payload, &self.prefix(), &self.shim_toml()?)?;
        let text = runtime.drop_in_text(&settings.handler, &settings.prefix);
        let drop_in = files::write_drop_in(&below(&settings.root, runtime.drop_in()), &text)?;
        let reported = self.reports_handler(node);
        let changed = files > 0 || drop_in.changed || !reported || !node.labeled;
        if drop_in.changed || !reported {
            if let Err(error) = self.verify(runtime) {
                drop_in.undo()?;
                return Err(error);
            }
            tracing::info!(runtime = ?runtime, "runtime restarts");
            self.restart(runtime)?;
        }
        self.await_handler(true).await?;
        let ready = [Change::Label(Some("true")), Change::State(Some("ready"))];
        self.change(&ready).await?;
        Ok(changed)
    }

    /// Removes the label, then, when no pod runs, everything else.
    pub(crate) async fn uninstall(&self) -> Result<()> {
        let node = self.node().await?;
        self.change(&[Change::Label(None)]).await?;
        let result = self.uninstall_steps(&node).await;
        let (kind, message) = match &result {
            Ok(()) => (EventKind::Removed, "runtime handler removed".to_owned()),
            Err(error) => (EventKind::RemoveFailed, boxlite_sys::report::report(error)),
        };
        self.event(&node, kind, &message).await;
        result?;
        self.change(&[Change::State(Some("removed"))]).await
    }

    async fn uninstall_steps(&self, node: &NodeInfo) -> Result<()> {
        let runtime = self.runtime(node)?;
        self.until("pods of the runtime class end", async || {
            let shims = files::running_shims(&self.settings.root, &self.settings.prefix)?;
            Ok(match shims.len() {
                0 => Seen::Reached,
                count => Seen::Not(format!("{count} pods are running; delete them")),
            })
        })
        .await?;
        let drop_in = below(&self.settings.root, runtime.drop_in());
        let existed = files::remove_drop_in(&drop_in)?;
        if existed || self.reports_handler(node) {
            tracing::info!(runtime = ?runtime, "runtime restarts");
            self.restart(runtime)?;
        }
        self.await_handler(false).await?;
        files::remove(&self.prefix())?;
        files::remove_registries(&below(&self.settings.root, STATE_DIR))
    }

    async fn node(&self) -> Result<NodeInfo> {
        self.cluster.node(&self.settings.node).await
    }

    async fn change(&self, changes: &[Change]) -> Result<()> {
        self.cluster.change(&self.settings.node, changes).await
    }

    /// An event that cannot be created must not hide the result.
    async fn event(&self, node: &NodeInfo, kind: EventKind, message: &str) {
        tracing::info!(kind = ?kind, message, "event created");
        if let Err(error) = self.cluster.event(node, kind, message).await {
            tracing::warn!(error = %boxlite_sys::report::Report(&error), "failed to create event");
        }
    }

    fn runtime(&self, node: &NodeInfo) -> Result<NodeRuntime> {
        match self.settings.runtime {
            Some(runtime) => Ok(runtime),
            None => NodeRuntime::detect(&node.runtime_version, &self.settings.root),
        }
    }

    fn prefix(&self) -> PathBuf {
        below(&self.settings.root, &self.settings.prefix)
    }

    /// The shim's configuration: the chart's lines, with its cache below the prefix unless they name another.
    fn shim_toml(&self) -> Result<String> {
        let text = &self.settings.shim_toml;
        let invalid = |error: toml::de::Error| InstallError::Config {
            path: "shim.toml".into(),
            reason: error.message().to_owned(),
        };
        let mut config: toml::Table = text.parse().map_err(invalid)?;
        let paths = config
            .entry("paths")
            .or_insert_with(|| toml::Table::new().into());
        if let Some(paths) = paths.as_table_mut() {
            let cache = self.settings.prefix.join("cache").display().to_string();
            paths.entry("cache").or_insert(cache.into());
        }
        let header = "# Written by the Helm chart boxlite from its value shim.\n";
        Ok(format!("{header}{config}"))
    }

    fn reports_handler(&self, node: &NodeInfo) -> bool {
        let mut handlers = node.handlers.iter().flatten();
        handlers.any(|handler| *handler == self.settings.handler)
    }

    /// Fails unless the runtime's configuration imports the directory of the drop-in.
    fn verify(&self, runtime: NodeRuntime) -> Result<()> {
        let Some(path) = runtime.importer(&self.settings.containerd_config) else {
            return Ok(());
        };
        let text = std::fs::read_to_string(below(&self.settings.root, &path)).unwrap_or_default();
        let invalid = |reason: String| InstallError::Config {
            path: path.clone(),
            reason,
        };
        let config: toml::Table = text
            .parse()
            .map_err(|e: toml::de::Error| invalid(e.message().to_owned()))?;
        let imports = config.get("imports").and_then(toml::Value::as_array);
        let mut imported = imports
            .into_iter()
            .flatten()
            .filter_map(toml::Value::as_str);
        let expected = runtime.drop_in().with_file_name("*.toml");
        if !imported.any(|import| Path::new(import) == expected) {
            let import = expected.display();
            return Err(invalid(match runtime {
                NodeRuntime::Containerd => format!(
                    "it does not import {import}: add the line imports = [\"{import}\"] at its top"
                ),
                _ => format!("it does not import {import}, as newer versions do"),
            }));
        }
        Ok(())
    }

    fn restart(&self, runtime: NodeRuntime) -> Result<()> {
        let command = match self.settings.restart.is_empty() {
            true => runtime.restart(&self.settings.root),
            false => self.settings.restart.clone(),
        };
        self.host.run(&command).map(drop)
    }

    /// Waits until the kubelet reports the handler, or no longer reports it.
    async fn await_handler(&self, present: bool) -> Result<()> {
        let handler = &self.settings.handler;
        let verb = if present {
            "is reported"
        } else {
            "is no longer reported"
        };
        self.until(&format!("handler {handler} {verb}"), async || {
            let node = self.node().await?;
            if self.reports_handler(&node) == present {
                return Ok(Seen::Reached);
            }
            Ok(Seen::Not(match node.handlers {
                Some(handlers) => format!("handlers {handlers:?}"),
                None => "no status.runtimeHandlers, which Kubernetes has from 1.30 on".to_owned(),
            }))
        })
        .await
    }

    /// Looks until a state is reached.
    async fn until(
        &self,
        awaited: &str,
        mut look: impl AsyncFnMut() -> Result<Seen>,
    ) -> Result<()> {
        let (begun, limit) = (
            Instant::now(),
            Duration::from_secs(self.settings.timeout_seconds),
        );
        loop {
            // The API server may be away while its node's runtime restarts.
            let seen = match look().await {
                Ok(Seen::Reached) => return Ok(()),
                Ok(Seen::Not(seen)) => seen,
                Err(error) => boxlite_sys::report::report(&error),
            };
            if begun.elapsed() >= limit {
                return Err(InstallError::Timeout {
                    awaited: awaited.to_owned(),
                    seconds: limit.as_secs(),
                    seen,
                });
            }
            tokio::time::sleep(Duration::from_millis(self.settings.poll_ms)).await;
        }
    }
}

/// Result of a look at a state.
pub(crate) enum Seen {
    Reached,
    /// Description of the current state.
    Not(String),
}
