//! [`Publisher`]: publishes task events to containerd or boxlite-cri, in order, over an [`EventTransport`].
//!
//! Publishing does not block: events wait in a bounded queue while the receiver is unreachable (it may be restarting), and
//! the oldest are dropped when the queue is full. Delivery is at least once. One task sends; the daemon owns and ends it.

mod transport;

pub use transport::EventTransport;

use boxlite_sys::report::Report;
use boxlite_sys::sync::Mutex;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{MessageField, MessageFull};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::topics;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use transport::{Failure, Sender};

/// Maximum number of queued events. A pod publishes a handful per container, so this covers hours of absence.
const QUEUE_CAPACITY: usize = 4096;
/// Timeout of one delivery, after which the connection is considered dead.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Initial delay after a failed delivery; doubled up to [`MAX_RETRY_DELAY`].
const MIN_RETRY_DELAY: Duration = Duration::from_millis(50);
/// Maximum delay between attempts, and so the latency of events after the receiver's return.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);
/// Attempts for an event that the receiver rejects.
const MAX_REJECTED_ATTEMPTS: u32 = 5;
/// Timeout for delivering the last events when the shim ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// An event message with its topic.
pub trait Event: MessageFull {
    /// Topic in containerd.
    const TOPIC: &'static str;
}

macro_rules! events {
    ($($message:ty => $topic:ident),* $(,)?) => {
        $(impl Event for $message { const TOPIC: &'static str = topics::$topic; })*
    };
}

events! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
}

/// Handle to the event queue; clones share it.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
    namespace: Arc<str>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<Envelope>,
    dropped: u64,
    /// There is no receiver: publishing is a no-op.
    closed: bool,
}

impl Shared {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock()
    }
}

impl Publisher {
    /// Creates a publisher for `namespace`, and the future that delivers its events by `transport` until `ended`. The caller
    /// spawns the future.
    pub fn new(
        transport: EventTransport,
        namespace: &str,
        ended: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                closed: transport == EventTransport::Disabled,
                ..Queue::default()
            }),
            changed: Notify::new(),
        });
        let publisher = Self {
            shared: shared.clone(),
            namespace: namespace.into(),
        };
        (publisher, deliver(shared, transport, ended))
    }

    /// Returns containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Queues an event without blocking.
    pub fn publish<E: Event>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(topic = E::TOPIC, error = %Report(&error), "failed to encode event");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: MessageField::some(crate::time::now()),
            namespace: self.namespace.to_string(),
            topic: E::TOPIC.to_owned(),
            event: MessageField::some(Any {
                // containerd's typeurl has no host part.
                type_url: E::descriptor().full_name().to_owned(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut queue = self.shared.queue();
        if queue.closed {
            return;
        }
        if queue.events.len() == QUEUE_CAPACITY {
            queue.events.pop_front();
            queue.dropped += 1;
            if queue.dropped.is_power_of_two() {
                tracing::warn!(
                    dropped = queue.dropped,
                    "event publisher unreachable, dropping oldest events"
                );
            }
        }
        queue.events.push_back(envelope);
        drop(queue);
        self.shared.changed.notify_one();
    }
}

async fn deliver(shared: Arc<Shared>, transport: EventTransport, ended: CancellationToken) {
    let send = send_all(&shared, transport);
    tokio::pin!(send);
    tokio::select! {
        () = &mut send => {}
        () = ended.cancelled() => {
            let flushed = async {
                tokio::select! {
                    () = &mut send => {}
                    () = drained(&shared) => {}
                }
            };
            if tokio::time::timeout(FLUSH_TIMEOUT, flushed).await.is_err() {
                let undelivered = shared.queue().events.len();
                tracing::warn!(undelivered, "shim exiting with undelivered events");
            }
        }
    }
}

async fn drained(shared: &Shared) {
    while !shared.queue().events.is_empty() {
        tokio::time::sleep(MIN_RETRY_DELAY / 5).await;
    }
}

/// Sends queued events in order, forever. An event leaves the queue once it is delivered, so an empty queue means that all
/// were delivered.
async fn send_all(shared: &Shared, transport: EventTransport) {
    let mut sender = Sender::new(transport);
    let mut pause = MIN_RETRY_DELAY;
    let mut rejections = 0;
    loop {
        let Some(envelope) = shared.queue().events.front().cloned() else {
            shared.changed.notified().await;
            continue;
        };
        match sender.send(envelope).await {
            Ok(()) => rejections = 0,
            Err(Failure::Rejected(error)) if rejections + 1 >= MAX_REJECTED_ATTEMPTS => {
                tracing::warn!(error = %Report(&error), "event rejected, dropping it");
                rejections = 0;
            }
            Err(failure) => {
                if matches!(failure, Failure::Rejected(_)) {
                    rejections += 1;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(MAX_RETRY_DELAY);
                continue;
            }
        }
        pause = MIN_RETRY_DELAY;
        shared.queue().events.pop_front();
    }
}

#[cfg(test)]
mod tests;
