//! [`EventServer`]: receives the events of shims on `state/events.ttrpc`, as containerd does.
//!
//! Events are hints: Task.Wait is authoritative for exits, and recovery queries the state after a restart. Unknown events
//! and events of unknown boxes are therefore dropped.

use crate::error::{Result, RuntimeError};
use async_trait::async_trait;
use boxlite_sys::unix_socket;
use containerd_shim_protos::api;
use containerd_shim_protos::events::task as task_events;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
use containerd_shim_protos::shim_async::{Events, create_events};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::asynchronous::transport::Listener;

/// Capacity of the channel to the runtime; a shim that publishes into a full channel waits.
const CHANNEL_CAPACITY: usize = 1024;
/// Timeout for open calls on shutdown; they are short.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// An event of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShimEvent {
    /// The init process exited.
    Exit {
        /// Container id.
        container_id: String,
    },
    /// The OOM killer killed a process of the container.
    Oom {
        /// Container id.
        container_id: String,
    },
}

struct Receiver {
    events: mpsc::Sender<ShimEvent>,
}

#[async_trait]
impl Events for Receiver {
    async fn forward(
        &self,
        _: &TtrpcContext,
        request: api::ForwardRequest,
    ) -> ttrpc::Result<Empty> {
        if let Some(event) = decode(&request) {
            // Without a receiver the runtime is shutting down, which the shim need not know.
            let _ = self.events.send(event).await;
        }
        Ok(Empty::new())
    }
}

fn decode(request: &api::ForwardRequest) -> Option<ShimEvent> {
    let any = request.envelope.as_ref()?.event.as_ref()?;
    // containerd writes bare names; others prefix a host.
    match any.type_url.rsplit('/').next()? {
        "containerd.events.TaskExit" => {
            let exit = task_events::TaskExit::parse_from_bytes(&any.value).ok()?;
            // Exits of exec'd processes have another id and are not needed here.
            (exit.id.is_empty() || exit.id == exit.container_id).then_some(ShimEvent::Exit {
                container_id: exit.container_id,
            })
        }
        "containerd.events.TaskOOM" => {
            let oom = task_events::TaskOOM::parse_from_bytes(&any.value).ok()?;
            Some(ShimEvent::Oom {
                container_id: oom.container_id,
            })
        }
        _ => None,
    }
}

/// A running event server.
pub struct EventServer {
    server: ttrpc::asynchronous::Server,
    path: PathBuf,
}

impl std::fmt::Debug for EventServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventServer")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl EventServer {
    /// Serves at `path`. The caller holds the runtime's lock, so an existing socket belongs to a dead process.
    ///
    /// # Errors
    /// `Io`, `Internal`.
    pub async fn start(path: &Path) -> Result<(Self, mpsc::Receiver<ShimEvent>)> {
        let listener = unix_socket::bind(path).map_err(|source| RuntimeError::Io {
            operation: "listen on",
            path: path.to_owned(),
            source,
        })?;
        let (events, receiver) = mpsc::channel(CHANNEL_CAPACITY);
        let mut server = ttrpc::asynchronous::Server::new()
            .add_listener(Listener::new(
                tokio_stream::wrappers::UnixListenerStream::new(listener),
            ))
            .register_service(create_events(Arc::new(Receiver { events })));
        server
            .start()
            .await
            .map_err(|error| RuntimeError::Internal {
                detail: format!("failed to start the event server: {error}"),
            })?;
        let path = path.to_owned();
        Ok((Self { server, path }, receiver))
    }

    /// Stops serving and removes the socket.
    pub async fn stop(mut self) {
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.server.shutdown())
            .await
            .is_err()
        {
            tracing::debug!(timeout = ?SHUTDOWN_TIMEOUT, "event server stopped with open calls");
        }
        let _ = std::fs::remove_file(&self.path);
    }
}
