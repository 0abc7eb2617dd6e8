//! NRI: plugins that get an event for every pod and container, and may adjust containers before their creation.
//!
//! ```text
//!  socket (listen) ─┐
//!                   ├─▶ Plugin::register ─▶ synchronized under the gate ─▶ plugins, by index
//!  launched ────────┘
//!  an RPC: Nri::begin_session ─▶ Session: events, one plugin after the other ─▶ collect ─▶ the RPC applies the result
//! ```
//!
//! The gate keeps a new plugin from missing a container: an RPC holds it (shared) from its event until its change is
//! visible; a new plugin holds it (exclusively) from the snapshot until its registration. Events are sent one at a
//! time.
//!
//! The validation of adjustments is in [`adjust`], the wire protocol in [`connection`] and [`wire`]. This module does
//! not depend on the service, which implements [`Host`].

pub(crate) mod adjust;
pub(crate) mod collect;
mod connection;
mod launch;
pub(crate) mod messages;
mod owners;
mod plugin;
pub(crate) mod resources;
mod session;
#[cfg(test)]
mod tests;
mod unsupported;
mod wire;

#[cfg(test)]
pub(crate) use plugin::Refusal;
pub(crate) use session::{Session, SessionError};

use crate::config::NriConfig;
use crate::server::socket::{self, SocketError};
use boxlite_proto::nri::v1alpha1::{Container, ContainerUpdate, PodSandbox};
use boxlite_sys::sync::Mutex;
use plugin::{Plugin, PluginError};
use std::collections::HashSet;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::{OwnedSemaphorePermit, RwLock, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Timeout of a new plugin that waits for creations in progress; no creation starts while it waits.
const GATE_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum number of plugins, including those that register. A node has a handful.
const MAX_PLUGINS: usize = 64;
/// Timeout of the shutdown of launched plugins and tasks.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay after a failed accept, most likely for lack of descriptors.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Timeouts of plugins.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// For the registration and the synchronization.
    pub registration: Duration,
    /// For all other calls.
    pub request: Duration,
}

/// The service as the registry needs it.
#[tonic::async_trait]
pub(crate) trait Host: Send + Sync + std::fmt::Debug {
    /// Returns every listed pod that is not stopped, and every container that has not exited.
    async fn snapshot(&self) -> (Vec<PodSandbox>, Vec<Container>);

    /// Updates containers; returns the failed updates without `ignore_failure`.
    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate>;
}

/// The plugin registry, or nothing if NRI is disabled. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Nri(Option<Arc<Registry>>);

#[derive(Debug)]
struct Registry {
    limits: Limits,
    host: Arc<dyn Host>,
    /// See the module documentation.
    gate: Arc<RwLock<()>>,
    /// Sorted by index. Locked while an event is sent to all.
    plugins: tokio::sync::Mutex<Vec<Arc<Plugin>>>,
    /// Pods and containers whose stop was reported.
    stopped: Mutex<HashSet<String>>,
    launched: Mutex<Vec<launch::Launched>>,
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Nri {
    /// Launches the pre-installed plugins and listens for others; returns after the launched plugins have registered
    /// or failed. Does nothing if NRI is disabled. Failures of plugins are logged; a failure to bind the socket is an
    /// error.
    ///
    /// Dropping the future leaves tasks and launched plugins to the drop of the handle.
    pub(crate) async fn start(
        config: &NriConfig,
        host: Arc<dyn Host>,
    ) -> Result<Self, SocketError> {
        if !config.enable {
            return Ok(Self(None));
        }
        let limits = Limits {
            registration: config.registration_timeout,
            request: config.request_timeout,
        };
        let registry = Arc::new(Registry::new(limits, host));
        let listener = match config.disable_connections {
            true => None,
            false => Some(socket::bind(&config.socket_path)?),
        };
        registry.launch(config).await;
        if let Some(listener) = listener {
            tracing::info!(socket = %config.socket_path.display(), "listening for NRI plugins");
            let accepting = registry.clone().accept(listener);
            registry.tasks.spawn(accepting);
        }
        Ok(Self(Some(registry)))
    }

    /// Begins the session of an RPC, during which no plugin is added. Waits for a plugin that is registering, at most
    /// for the registration timeout.
    pub(crate) async fn begin_session(&self) -> Session {
        match &self.0 {
            None => Session::disabled(),
            Some(registry) => {
                let gate = registry.gate.clone().read_owned().await;
                Session::open(registry.clone(), gate)
            }
        }
    }

    /// Returns whether NRI is enabled.
    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Spawns `work`, which is cancelled when the daemon stops.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(registry) = &self.0 {
            let stop = registry.stop.clone();
            registry.tasks.spawn(async move {
                stop.run_until_cancelled(work).await;
            });
        }
    }

    /// Marks pods and containers that were stopped before the first plugin registered: their stop is not reported.
    pub(crate) fn mark_stopped(&self, ids: impl IntoIterator<Item = String>) {
        if let Some(registry) = &self.0 {
            registry.stopped().extend(ids);
        }
    }

    /// Returns whether the stop of a pod or container was reported.
    pub(crate) fn was_stopped(&self, id: &str) -> bool {
        self.0
            .as_ref()
            .is_some_and(|registry| registry.stopped().contains(id))
    }

    /// Notifies the plugins of the shutdown, stops launched plugins, and waits for every task with a timeout.
    pub(crate) async fn stop(&self) {
        let Some(registry) = &self.0 else { return };
        registry.stop.cancel();
        let ending = async {
            let plugins = std::mem::take(&mut *registry.plugins.lock().await);
            futures::future::join_all(plugins.iter().map(|plugin| plugin.shut_down())).await;
            let launched = std::mem::take(&mut *registry.launched());
            for child in launched {
                child.end().await;
            }
            registry.tasks.close();
            registry.tasks.wait().await;
        };
        if tokio::time::timeout(STOP_TIMEOUT, ending).await.is_err() {
            tracing::warn!("NRI plugins did not stop in time");
        }
    }
}

impl Registry {
    fn new(limits: Limits, host: Arc<dyn Host>) -> Self {
        Self {
            limits,
            host,
            gate: Arc::default(),
            plugins: tokio::sync::Mutex::default(),
            stopped: Mutex::default(),
            launched: Mutex::default(),
            slots: Arc::new(Semaphore::new(MAX_PLUGINS)),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    fn stopped(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.stopped.lock()
    }

    fn launched(&self) -> std::sync::MutexGuard<'_, Vec<launch::Launched>> {
        self.launched.lock()
    }

    fn take_launched(&self, name: &str) -> Option<launch::Launched> {
        let mut launched = self.launched();
        let at = launched.iter().position(|child| child.name() == name)?;
        Some(launched.swap_remove(at))
    }

    /// Launches the installed plugins concurrently, and waits until each has registered or failed.
    async fn launch(self: &Arc<Self>, config: &NriConfig) {
        let found = match launch::discover(&config.plugin_path, &config.plugin_config_path) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(
                    error = boxlite_runtime::report(&error),
                    "failed to discover NRI plugins"
                );
                return;
            }
        };
        let connecting = found.into_iter().map(|installed| async move {
            let name = installed.full_name();
            let preassigned = (
                installed.index.clone(),
                installed.name.clone(),
                installed.config.clone(),
            );
            match launch::Launched::start(&installed) {
                Ok((launched, socket)) => {
                    match self.clone().connect(socket, Some(preassigned)).await {
                        Some(plugin) => {
                            self.launched().push(launched);
                            // It may have exited before it was added to the list.
                            if plugin.is_closed()
                                && let Some(launched) = self.take_launched(&name)
                            {
                                launched.end().await;
                            }
                        }
                        None => launched.end().await,
                    }
                }
                Err(error) => tracing::error!(
                    plugin = name,
                    error = boxlite_runtime::report(&error),
                    "failed to launch NRI plugin"
                ),
            }
        });
        futures::future::join_all(connecting).await;
    }

    async fn accept(self: Arc<Self>, listener: UnixListener) {
        loop {
            let accepted = self
                .stop
                .run_until_cancelled(async {
                    // The slot first: without one, clients wait in the backlog of the socket.
                    let slot = self.slots.clone().acquire_owned().await.ok()?;
                    match listener.accept().await {
                        Ok((socket, _)) => Some((socket.into_std().ok()?, slot)),
                        Err(error) => {
                            tracing::warn!(%error, "failed to accept NRI plugin");
                            tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                            None
                        }
                    }
                })
                .await;
            match accepted {
                None => return,
                Some(None) => {}
                Some(Some((socket, slot))) => {
                    let this = self.clone();
                    self.tasks.spawn(async move {
                        let held: OwnedSemaphorePermit = slot;
                        let stop = this.stop.clone();
                        let plugin = stop.run_until_cancelled(this.clone().connect(socket, None));
                        if let Some(Some(plugin)) = plugin.await {
                            stop.run_until_cancelled(plugin.closed()).await;
                        }
                        drop(held);
                    });
                }
            }
        }
    }

    /// Registers the plugin behind a socket; failures are logged. A task removes it when its connection ends.
    async fn connect(
        self: Arc<Self>,
        socket: StdUnixStream,
        preassigned: Option<(String, String, String)>,
    ) -> Option<Arc<Plugin>> {
        let said = preassigned
            .as_ref()
            .map_or("a connecting plugin".to_owned(), |(index, name, _)| {
                format!("{index}-{name}")
            });
        let registered = Plugin::register(
            socket,
            preassigned,
            self.limits,
            self.host.clone(),
            &self.tasks,
        )
        .await;
        let admitted = match registered {
            Ok(plugin) => self.admit(Arc::new(plugin)).await,
            Err(error) => Err(error),
        };
        match admitted {
            Ok(plugin) => {
                tracing::info!(plugin = plugin.full_name(), "NRI plugin registered");
                self.tasks
                    .spawn(self.clone().remove_when_closed(plugin.clone()));
                Some(plugin)
            }
            Err(error) => {
                tracing::error!(
                    plugin = said,
                    error = boxlite_runtime::report(&error),
                    "NRI plugin registration rejected"
                );
                None
            }
        }
    }

    /// Synchronizes a plugin and adds it to the registry. Its updates are applied before those of any later event.
    async fn admit(&self, plugin: Arc<Plugin>) -> Result<Arc<Plugin>, PluginError> {
        let alone = tokio::time::timeout(GATE_TIMEOUT, self.gate.write()).await;
        let Ok(_alone) = alone else {
            plugin.close();
            return Err(PluginError::Busy(GATE_TIMEOUT));
        };
        let (pods, containers) = self.host.snapshot().await;
        let updates = plugin.synchronize(pods, containers).await?;
        if !updates.is_empty() {
            let failed = self.host.update(updates).await;
            if !failed.is_empty() {
                tracing::warn!(
                    plugin = plugin.full_name(),
                    failed = failed.len(),
                    "failed to apply updates of new NRI plugin"
                );
            }
        }
        let mut plugins = self.plugins.lock().await;
        let at = plugins.partition_point(|other| other.index() <= plugin.index());
        plugins.insert(at, plugin.clone());
        Ok(plugin)
    }

    /// Waits until the connection of a plugin ends and removes it.
    async fn remove_when_closed(self: Arc<Self>, plugin: Arc<Plugin>) {
        if self
            .stop
            .run_until_cancelled(plugin.closed())
            .await
            .is_some()
        {
            tracing::info!(plugin = plugin.full_name(), "NRI plugin disconnected");
            let mut plugins = self.plugins.lock().await;
            plugins.retain(|other| !Arc::ptr_eq(other, &plugin));
            drop(plugins);
            // A launched plugin has exited, or hangs without its connection.
            let gone = self.take_launched(&plugin.full_name());
            if let Some(launched) = gone {
                launched.end().await;
            }
        }
    }
}
