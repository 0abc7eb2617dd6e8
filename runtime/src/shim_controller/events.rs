//! [`EventServer`]: receives what shims publish, on `state/events.ttrpc`, as containerd would.
//!
//! Events only hurry things: the truth about an exit is Task.Wait, and what happened while nobody listened is asked
//! for at recovery. So an event that is not understood, or comes from a box that is not known, is dropped here
//! without harm.

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

/// Events waiting for the runtime; a shim that publishes into a full queue waits.
const QUEUE: usize = 1024;
/// Longest wait for open calls when the server ends; they are short.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(2);

/// What a shim tells about a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShimEvent {
    /// Its init process ended.
    Exit {
        /// Container id.
        container_id: String,
    },
    /// The kernel killed a process of it for want of memory.
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
            // The runtime is going down when nobody receives; the shim need not know.
            let _ = self.events.send(event).await;
        }
        Ok(Empty::new())
    }
}

fn decode(request: &api::ForwardRequest) -> Option<ShimEvent> {
    let any = request.envelope.as_ref()?.event.as_ref()?;
    // containerd writes bare names; others put a host before them.
    match any.type_url.rsplit('/').next()? {
        "containerd.events.TaskExit" => {
            let exit = task_events::TaskExit::parse_from_bytes(&any.value).ok()?;
            // Exec'd processes have an id of their own; nobody here waits for those.
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

/// The running server.
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
    /// Serves at `path`; the caller holds the runtime's lock, so a socket that lies there is a dead runtime's.
    ///
    /// # Errors
    /// `Io`, `Internal`.
    pub async fn start(path: &Path) -> Result<(Self, mpsc::Receiver<ShimEvent>)> {
        let listener = unix_socket::bind(path).map_err(|source| RuntimeError::Io {
            what: "cannot listen on",
            path: path.to_owned(),
            source,
        })?;
        let (events, receiver) = mpsc::channel(QUEUE);
        let mut server = ttrpc::asynchronous::Server::new()
            .add_listener(Listener::new(
                tokio_stream::wrappers::UnixListenerStream::new(listener),
            ))
            .register_service(create_events(Arc::new(Receiver { events })));
        server
            .start()
            .await
            .map_err(|error| RuntimeError::Internal {
                what: format!("event server: {error}"),
            })?;
        let path = path.to_owned();
        Ok((Self { server, path }, receiver))
    }

    /// Stops serving and removes the socket.
    pub async fn stop(mut self) {
        if tokio::time::timeout(SHUTDOWN_LIMIT, self.server.shutdown())
            .await
            .is_err()
        {
            tracing::debug!("event server still had calls open after {SHUTDOWN_LIMIT:?}");
        }
        let _ = std::fs::remove_file(&self.path);
    }
}
