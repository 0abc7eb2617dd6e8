//! NRI: plugins that are told of every pod and container, and may adjust containers before they exist.
//!
//! ```text
//!  socket (listen) ─┐
//!                   ├─▶ Plugin::register ─▶ synchronized under the gate ─▶ plugins, by index
//!  launched ────────┘
//!  a verb: Nri::begin_session ─▶ Session: events, one plugin after the other ─▶ collect ─▶ the verb applies what came of it
//! ```
//!
//! The gate is what keeps a new plugin from missing a container: a verb holds it from its event to the moment its change can be seen,
//! a new plugin holds it alone from reading what there is to being among those who are told. Events go out one at a time.
//!
//! What a plugin may not have is [`adjust`]'s, the wire is [`connection`]'s and [`wire`]'s. Nothing here knows the service: it lends a [`Host`].

pub mod adjust;
pub mod collect;
mod connection;
mod launch;
pub mod messages;
mod owners;
mod plugin;
pub mod resources;
mod session;
#[cfg(test)]
mod tests;
mod wire;

pub use session::{Session, SessionError};

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

/// How long a new plugin waits for creations under way. It is let in between two, and while it waits no other begins.
const GATE_TIMEOUT: Duration = Duration::from_secs(30);
/// Plugins and those who want to become one, at a time. A node has a handful.
const MAX_PLUGINS: usize = 64;
/// How long the end waits for launched plugins and tasks.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed accept: out of descriptors, most likely.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// How long plugins may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// To register, and to take in what is there.
    pub registration: Duration,
    /// For everything else.
    pub request: Duration,
}

/// What the registry wants of the service.
#[tonic::async_trait]
pub trait Host: Send + Sync + std::fmt::Debug {
    /// Every pod that is listed and not stopped, every container that has not ended.
    async fn snapshot(&self) -> (Vec<PodSandbox>, Vec<Container>);

    /// Updates containers; answers those that failed and were not allowed to.
    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate>;
}

/// The plugins, or nothing where NRI is off. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Nri(Option<Arc<Registry>>);

#[derive(Debug)]
struct Registry {
    limits: Limits,
    host: Arc<dyn Host>,
    /// See the header.
    gate: Arc<RwLock<()>>,
    /// By index. Held while an event goes round.
    plugins: tokio::sync::Mutex<Vec<Arc<Plugin>>>,
    /// Pods and containers whose stop was told.
    stopped: Mutex<HashSet<String>>,
    launched: Mutex<Vec<launch::Launched>>,
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Nri {
    /// Launches the pre-installed plugins and listens for others; returns when the launched ones are in or have failed. Nothing where it is
    /// not enabled. A plugin that fails is said in the log; a socket that cannot be had is an error.
    ///
    /// Dropping the future leaves tasks and launched plugins to the handle's drop.
    pub async fn start(config: &NriConfig, host: Arc<dyn Host>) -> Result<Self, SocketError> {
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
            tracing::info!(socket = %config.socket_path.display(), "NRI plugins may connect");
            let accepting = registry.clone().accept(listener);
            registry.tasks.spawn(accepting);
        }
        Ok(Self(Some(registry)))
    }

    /// Lets a verb in: events by the session, and no plugin becomes one while it is held. Waits for a plugin that is being let in, at most
    /// the registration's limit.
    pub async fn begin_session(&self) -> Session {
        match &self.0 {
            None => Session::disabled(),
            Some(registry) => {
                let gate = registry.gate.clone().read_owned().await;
                Session::open(registry.clone(), gate)
            }
        }
    }

    /// Whether it is on.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Owns `work` until the end of the daemon, which gives it up.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(registry) = &self.0 {
            let stop = registry.stop.clone();
            registry.tasks.spawn(async move {
                stop.run_until_cancelled(work).await;
            });
        }
    }

    /// Notes pods and containers that were stopped before the first plugin came: nobody is told of them.
    pub fn mark_stopped(&self, ids: impl IntoIterator<Item = String>) {
        if let Some(registry) = &self.0 {
            registry.stopped().extend(ids);
        }
    }

    /// Whether a pod's or container's stop was told.
    pub fn was_stopped(&self, id: &str) -> bool {
        self.0
            .as_ref()
            .is_some_and(|registry| registry.stopped().contains(id))
    }

    /// Tells the plugins that the runtime goes down, ends launched ones, and waits for every task, bounded.
    pub async fn stop(&self) {
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
            tracing::warn!("NRI plugins did not go in time");
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

    /// Launches what is installed, all at once, and waits until each is in or has failed.
    async fn launch(self: &Arc<Self>, config: &NriConfig) {
        let found = match launch::discover(&config.plugin_path, &config.plugin_config_path) {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(
                    error = boxlite_runtime::report(&error),
                    "no NRI plugin is launched"
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
                            // It may have ended before it was in the list.
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
                    "an NRI plugin could not be launched"
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
                    // The slot first: who finds none waits in the socket's own queue.
                    let slot = self.slots.clone().acquire_owned().await.ok()?;
                    match listener.accept().await {
                        Ok((socket, _)) => Some((socket.into_std().ok()?, slot)),
                        Err(error) => {
                            tracing::warn!(%error, "accepting an NRI plugin failed");
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

    /// From a socket to one of the plugins; every failure is said in the log. A task takes it out again when its connection ends.
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
                tracing::info!(plugin = plugin.full_name(), "NRI plugin is in");
                self.tasks
                    .spawn(self.clone().remove_when_closed(plugin.clone()));
                Some(plugin)
            }
            Err(error) => {
                tracing::error!(
                    plugin = said,
                    error = boxlite_runtime::report(&error),
                    "NRI plugin is not taken"
                );
                None
            }
        }
    }

    /// Synchronizes a plugin and makes it one of those who are told. Its wishes are carried out before anybody else's.
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
                    "updates of a new plugin failed"
                );
            }
        }
        let mut plugins = self.plugins.lock().await;
        let at = plugins.partition_point(|other| other.index() <= plugin.index());
        plugins.insert(at, plugin.clone());
        Ok(plugin)
    }

    /// Waits for a plugin's end and takes it out.
    async fn remove_when_closed(self: Arc<Self>, plugin: Arc<Plugin>) {
        if self
            .stop
            .run_until_cancelled(plugin.closed())
            .await
            .is_some()
        {
            tracing::info!(plugin = plugin.full_name(), "NRI plugin is gone");
            let mut plugins = self.plugins.lock().await;
            plugins.retain(|other| !Arc::ptr_eq(other, &plugin));
            drop(plugins);
            // A launched one has ended, or hangs without its connection.
            let gone = self.take_launched(&plugin.full_name());
            if let Some(launched) = gone {
                launched.end().await;
            }
        }
    }
}
