//! One plugin: registration, configuration, synchronization, and the delivery of events.
//!
//! ```text
//!  connected ─ RegisterPlugin ─▶ Configure ─▶ Synchronize ─▶ (in the registry: events in order) ─▶ closed
//! ```
//!
//! If a plugin rejects an event, the call fails; a plugin that hangs, breaks the protocol or disconnects is closed,
//! and the call continues without it, as NRI specifies. The order of plugins and the merging of their answers are in
//! [`super`] and [`super::collect`].

use super::connection::{CallError, Connection, INVALID_ARGUMENT, Service, UNIMPLEMENTED};
use super::wire::RpcStatus;
use super::{Host, Limits};
use boxlite_proto::nri::v1alpha1::log_request::Level;
use boxlite_proto::nri::v1alpha1::{
    ConfigureRequest, ConfigureResponse, Container, ContainerUpdate, Empty, Event, FailurePolicy,
    LogRequest, PodSandbox, RegisterPluginRequest, StateChangeEvent, SynchronizeRequest,
    SynchronizeResponse, UpdateContainersRequest, UpdateContainersResponse,
};
use boxlite_sys::sync::Mutex;
use prost::Message;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

/// The NRI release of the implemented interface.
const NRI_VERSION: &str = "v0.12.5";
/// Name of this runtime for plugins.
const RUNTIME_NAME: &str = "boxlite";
/// Subscription to all events.
const ALL_EVENTS: i32 = (1 << (Event::Last as i32 - 1)) - 1;
/// Maximum size of the pods and containers in one synchronization message: below ttrpc's 4 MiB with space for the
/// rest of the message.
const MAX_PART_BYTES: usize = 2 << 20;
/// Maximum length of a plugin's name; it appears in messages and logs.
const MAX_NAME_BYTES: usize = 253;
/// Maximum length of a logged message of a plugin.
const MAX_LOG_CHARS: usize = 1024;
/// Timeout of the shutdown notification.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// Reason why a plugin is not registered or no longer is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PluginError {
    /// It did not register in time.
    #[error("not registered within {0:?}")]
    Silent(Duration),
    /// It disconnected before its registration.
    #[error("disconnected before its registration")]
    Gone,
    /// The socket failed.
    #[error("failed to set up its socket")]
    Socket(#[from] std::io::Error),
    /// A call of the handshake failed.
    #[error("failed to call {step}")]
    Call {
        step: &'static str,
        #[source]
        source: CallError,
    },
    /// It subscribed to unknown events.
    #[error("invalid subscription: unknown events {0:#x}")]
    Events(i32),
    /// It does not support a synchronization in several messages.
    #[error("it does not support a synchronization in several messages, and the state exceeds one")]
    Parts,
    /// Calls in progress delayed its synchronization for too long.
    #[error("not synchronized within {0:?} because of calls in progress")]
    Busy(Duration),
}

/// A rejection of an event, with the name of the plugin.
#[derive(Debug, thiserror::Error)]
#[error("NRI plugin {plugin} rejected {event}: {message}")]
pub(crate) struct Refusal {
    pub plugin: String,
    pub event: &'static str,
    pub message: String,
}

/// A registered and configured plugin.
#[derive(Debug)]
pub(crate) struct Plugin {
    index: String,
    name: String,
    events: i32,
    connection: Connection,
    limits: Limits,
    /// Its failure to answer fails the request (`failure_policy.fail_request`).
    fails_requests: bool,
    /// Supports only StateChange: older than the dedicated calls.
    legacy: AtomicBool,
}

/// The runtime's service for one plugin.
struct RuntimeService {
    registered: Mutex<Option<oneshot::Sender<(String, String)>>>,
    /// Index and name of a launched plugin.
    preassigned: Option<(String, String)>,
    host: Arc<dyn Host>,
}

fn rpc_error(code: i32, message: impl Into<String>) -> RpcStatus {
    RpcStatus {
        code,
        message: message.into(),
    }
}

#[tonic::async_trait]
impl Service for RuntimeService {
    async fn call(
        &self,
        service: &str,
        method: &str,
        payload: &[u8],
    ) -> Result<Vec<u8>, RpcStatus> {
        let invalid = |error: prost::DecodeError| rpc_error(INVALID_ARGUMENT, error.to_string());
        match (service, method) {
            ("nri.pkg.api.v1alpha1.Runtime", "RegisterPlugin") => {
                self.register(RegisterPluginRequest::decode(payload).map_err(invalid)?)?;
                Ok(Empty {}.encode_to_vec())
            }
            ("nri.pkg.api.v1alpha1.Runtime", "UpdateContainers") => {
                let request = UpdateContainersRequest::decode(payload).map_err(invalid)?;
                if !request.evict.is_empty() {
                    // Plugin stubs have no call for it, and the published runtime ignores it, too.
                    tracing::warn!(
                        evictions = request.evict.len(),
                        "ignoring evictions requested by NRI plugin"
                    );
                }
                let failed = self.host.update(request.update).await;
                Ok(UpdateContainersResponse { failed }.encode_to_vec())
            }
            ("nri.pkg.api.v1alpha1.HostFunctions", "Log") => {
                log(&LogRequest::decode(payload).map_err(invalid)?);
                Ok(Empty {}.encode_to_vec())
            }
            _ => Err(rpc_error(
                UNIMPLEMENTED,
                format!("{service}/{method} not found"),
            )),
        }
    }
}

impl RuntimeService {
    fn register(&self, request: RegisterPluginRequest) -> Result<(), RpcStatus> {
        let identity = match &self.preassigned {
            Some(preassigned) => preassigned.clone(),
            None => {
                check_index(&request.plugin_idx)
                    .and_then(|()| check_name(&request.plugin_name))
                    .map_err(|reason| rpc_error(INVALID_ARGUMENT, reason))?;
                (request.plugin_idx, request.plugin_name)
            }
        };
        let sender = self.registered.lock().take();
        match sender {
            Some(sender) => {
                // The receiver is gone if the connection is being closed.
                let _ = sender.send(identity);
                Ok(())
            }
            None => Err(rpc_error(INVALID_ARGUMENT, "already registered")),
        }
    }
}

/// Writes a plugin's message to the log, escaped and bounded.
fn log(request: &LogRequest) {
    let text: String = request.msg.chars().take(MAX_LOG_CHARS).collect();
    match request.level() {
        Level::Error => tracing::error!(?text, "NRI plugin logged a message"),
        Level::Warn => tracing::warn!(?text, "NRI plugin logged a message"),
        Level::Info => tracing::info!(?text, "NRI plugin logged a message"),
        Level::Debug | Level::Unspecified => tracing::debug!(?text, "NRI plugin logged a message"),
    }
}

/// Accepts two digits.
pub(crate) fn check_index(index: &str) -> Result<(), String> {
    if index.len() == 2 && index.bytes().all(|byte| byte.is_ascii_digit()) {
        Ok(())
    } else {
        Err(format!(
            "invalid plugin index {index:?}: must be two digits"
        ))
    }
}

/// Accepts letters, digits and `-_.+`.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
    if !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.bytes().all(allowed) {
        Ok(())
    } else {
        Err(format!(
            "invalid plugin name {name:?}: must be letters, digits, - _ . +"
        ))
    }
}

impl Plugin {
    /// Registers and configures the plugin behind a socket. `preassigned` has index, name and configuration of a
    /// launched plugin. An error or a dropped future closes the socket.
    pub(crate) async fn register(
        socket: UnixStream,
        preassigned: Option<(String, String, String)>,
        limits: Limits,
        host: Arc<dyn Host>,
        tasks: &TaskTracker,
    ) -> Result<Self, PluginError> {
        let (sender, registered) = oneshot::channel();
        let (preassigned, config) = match preassigned {
            Some((index, name, config)) => (Some((index, name)), config),
            None => (None, String::new()),
        };
        let service = Arc::new(RuntimeService {
            registered: Mutex::new(Some(sender)),
            preassigned,
            host,
        });
        let connection = Connection::open(socket, service, tasks)?;
        let closing = CloseOnDrop(Some(connection.clone()));
        let registered = tokio::time::timeout(limits.registration, async {
            tokio::select! {
                identity = registered => identity.map_err(|_| PluginError::Gone),
                () = connection.closed() => Err(PluginError::Gone),
            }
        });
        let (index, name) = match registered.await {
            Ok(identity) => identity?,
            Err(_) => return Err(PluginError::Silent(limits.registration)),
        };
        let (events, policy) = configure(&connection, config, limits).await?;
        if policy.keep_connected {
            connection.keep_on_timeout();
        }
        closing.keep();
        Ok(Self {
            index,
            name,
            events,
            connection,
            limits,
            fails_requests: policy.fail_request,
            legacy: AtomicBool::new(false),
        })
    }

    /// Returns the name with its index, `00-name`.
    pub(crate) fn full_name(&self) -> String {
        format!("{}-{}", self.index, self.name)
    }

    /// Returns the index, which defines the order of plugins.
    pub(crate) fn index(&self) -> &str {
        &self.index
    }

    /// Returns the name without the index.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether it subscribed to an event.
    pub(crate) fn wants(&self, event: Event) -> bool {
        self.events & (1 << (event as i32 - 1)) != 0
    }

    /// Returns whether its connection is closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    /// Waits until its connection is closed.
    pub(crate) async fn closed(&self) {
        self.connection.closed().await;
    }

    /// Closes the connection.
    pub(crate) fn close(&self) {
        self.connection.close();
    }

    /// Sends all pods and containers, in several messages if necessary, and returns the requested updates. An error
    /// closes the plugin.
    ///
    /// Uses the timeout of the registration: the published 2 s of a request are too short for a large node.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, PluginError> {
        let done = self.synchronize_parts(pods, containers).await;
        if done.is_err() {
            self.close();
        }
        done
    }

    async fn synchronize_parts(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, PluginError> {
        let parts = parts(pods, containers);
        for part in parts {
            let more = part.more;
            let answer: SynchronizeResponse = self
                .connection
                .call("Synchronize", &part, self.limits.registration)
                .await
                .map_err(|source| PluginError::Call {
                    step: "Synchronize",
                    source,
                })?;
            if !more {
                return Ok(answer.update);
            }
            if !answer.more || !answer.update.is_empty() {
                return Err(PluginError::Parts);
            }
        }
        Ok(Vec::new())
    }

    /// Sends an event that it subscribed to. Returns `None` if it did not subscribe or is closed.
    pub(crate) async fn call<A: Message + Default>(
        &self,
        event: Event,
        request: &impl Message,
    ) -> Result<Option<A>, Refusal> {
        if self.is_closed() || !self.wants(event) {
            return Ok(None);
        }
        let answer = self
            .connection
            .call(method(event), request, self.limits.request)
            .await;
        self.check_answer(event, answer)
    }

    /// Sends a request for consent. A plugin that subscribed to all events and does not implement the call consents.
    pub(crate) async fn call_or_default<A: Message + Default>(
        &self,
        event: Event,
        request: &impl Message,
    ) -> Result<Option<A>, Refusal> {
        let answer = self
            .connection
            .call(method(event), request, self.limits.request)
            .await;
        match answer {
            Err(CallError::Rejected { code, .. }) if code == UNIMPLEMENTED => {
                Ok(Some(A::default()))
            }
            answer => self.check_answer(event, answer),
        }
    }

    /// Sends an event without an answer; by StateChange if the plugin does not implement the event's method.
    pub(crate) async fn notify(
        &self,
        event: Event,
        request: &impl Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), Refusal> {
        if self.is_closed() || !self.wants(event) {
            return Ok(());
        }
        if !self.legacy.load(Ordering::Relaxed) {
            let answer: Result<Empty, CallError> = self
                .connection
                .call(method(event), request, self.limits.request)
                .await;
            match answer {
                Err(CallError::Rejected { code, .. }) if code == UNIMPLEMENTED => {
                    self.legacy.store(true, Ordering::Relaxed);
                    tracing::warn!(
                        plugin = self.full_name(),
                        "NRI plugin supports only StateChange"
                    );
                }
                answer => return self.check_answer(event, answer).map(|_| ()),
            }
        }
        let change = StateChangeEvent {
            event: event as i32,
            pod: Some(pod.clone()),
            container: container.cloned(),
        };
        let answer: Result<Empty, CallError> = self
            .connection
            .call("StateChange", &change, self.limits.request)
            .await;
        self.check_answer(event, answer).map(|_| ())
    }

    /// A rejection fails the call. Any other error closes the plugin and the call continues, unless its failure policy says otherwise.
    fn check_answer<A>(
        &self,
        event: Event,
        answer: Result<A, CallError>,
    ) -> Result<Option<A>, Refusal> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(CallError::Rejected { message, .. }) => Err(Refusal {
                plugin: self.full_name(),
                event: method(event),
                message,
            }),
            Err(error) => {
                let is_timeout = matches!(error, CallError::Timeout { .. });
                let reason = boxlite_runtime::report(&error);
                // The connection remains open after a timeout if the plugin requests that.
                if !is_timeout || self.is_closed() {
                    self.close();
                }
                tracing::error!(
                    plugin = self.full_name(),
                    closed = self.is_closed(),
                    error = reason,
                    "NRI plugin failed to handle a request"
                );
                if self.fails_requests {
                    return Err(Refusal {
                        plugin: self.full_name(),
                        event: method(event),
                        message: format!("failed to handle the request: {reason}"),
                    });
                }
                Ok(None)
            }
        }
    }

    /// Notifies it of the shutdown and closes it.
    pub(crate) async fn shut_down(&self) {
        // It is closed in any case.
        let _: Result<Empty, CallError> = self
            .connection
            .call("Shutdown", &Empty {}, SHUTDOWN_TIMEOUT)
            .await;
        self.close();
    }
}

/// Closes a connection on drop unless kept.
struct CloseOnDrop(Option<Connection>);

impl CloseOnDrop {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            connection.close();
        }
    }
}

/// Configures it and returns its subscription and failure policy.
async fn configure(
    connection: &Connection,
    config: String,
    limits: Limits,
) -> Result<(i32, FailurePolicy), PluginError> {
    let milliseconds = |limit: Duration| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
    let request = ConfigureRequest {
        config,
        runtime_name: RUNTIME_NAME.into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        registration_timeout: milliseconds(limits.registration),
        request_timeout: milliseconds(limits.request),
        nri_version: NRI_VERSION.into(),
    };
    let answer: ConfigureResponse = connection
        .call("Configure", &request, limits.request)
        .await
        .map_err(|source| PluginError::Call {
            step: "Configure",
            source,
        })?;
    let policy = answer.failure_policy.unwrap_or_default();
    match answer.events {
        0 => Ok((ALL_EVENTS, policy)),
        events if events & !ALL_EVENTS != 0 => Err(PluginError::Events(events & !ALL_EVENTS)),
        events => Ok((events, policy)),
    }
}

/// Splits the state into messages of bounded size, pods first; all but the last are marked as continued.
fn parts(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Vec<SynchronizeRequest> {
    let mut parts = vec![SynchronizeRequest::default()];
    let mut bytes = 0;
    let mut room = |parts: &mut Vec<SynchronizeRequest>, size: usize| {
        if bytes > 0 && bytes + size > MAX_PART_BYTES {
            parts.push(SynchronizeRequest::default());
            bytes = 0;
        }
        bytes += size;
    };
    for pod in pods {
        room(&mut parts, pod.encoded_len());
        if let Some(part) = parts.last_mut() {
            part.pods.push(pod);
        }
    }
    for container in containers {
        room(&mut parts, container.encoded_len());
        if let Some(part) = parts.last_mut() {
            part.containers.push(container);
        }
    }
    let last = parts.len() - 1;
    for part in &mut parts[..last] {
        part.more = true;
    }
    parts
}

/// Returns the method name of an event.
pub(crate) fn method(event: Event) -> &'static str {
    match event {
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
        Event::Unknown | Event::Last => "StateChange",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugin_names_and_indices_are_validated() {
        assert!(check_index("07").is_ok());
        for index in ["", "7", "007", "a1", "٠٧"] {
            assert!(check_index(index).is_err(), "{index}");
        }
        assert!(check_name("my-plugin_1.x+y").is_ok());
        for name in ["", "a b", "a/b", &"x".repeat(254)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn large_state_is_split_without_loss() {
        let container = |id: usize| Container {
            id: id.to_string(),
            args: vec!["x".repeat(200_000)],
            ..Default::default()
        };
        let pods = vec![PodSandbox::default(); 3];
        let parts = parts(pods, (0..40).map(container).collect());
        assert!(parts.len() > 3, "{}", parts.len());
        assert!(parts.iter().all(|part| part.encoded_len() < 3 << 20));
        let more: Vec<bool> = parts.iter().map(|part| part.more).collect();
        assert!(more[..more.len() - 1].iter().all(|more| *more) && !more[more.len() - 1]);
        let ids: Vec<String> = parts
            .iter()
            .flat_map(|part| part.containers.iter().map(|c| c.id.clone()))
            .collect();
        assert_eq!(ids, (0..40).map(|id| id.to_string()).collect::<Vec<_>>());
        assert_eq!(parts.iter().map(|part| part.pods.len()).sum::<usize>(), 3);
    }

    #[test]
    fn empty_state_is_one_part() {
        let parts = parts(Vec::new(), Vec::new());
        assert_eq!(parts, [SynchronizeRequest::default()]);
    }

    #[test]
    fn all_events_mask_has_fourteen_events() {
        assert_eq!(ALL_EVENTS, 0x3fff);
    }
}
