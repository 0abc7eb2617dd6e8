//! [`Publisher`]: task events to containerd (or boxlite-cri), in order; how they get there is [`way`]'s.
//!
//! Never blocks who publishes: events wait in a bounded queue while the daemon is away (it may be restarted) and the
//! oldest go first when the queue is full. Delivery is at least once. One task sends; the daemon owns and ends it.

mod way;

pub use way::Way;

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
use way::{Failure, Sender};

/// Events kept while nobody takes them. A pod makes a handful per container: this is hours of absence.
const QUEUE_LIMIT: usize = 4096;
/// How long one delivery may take before the connection counts as dead.
const FORWARD_LIMIT: Duration = Duration::from_secs(5);
/// First pause after a failed delivery; doubled up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two attempts: a daemon that is back hears of an exit this much later.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How often an event that the daemon itself refuses is offered.
const REFUSED_LIMIT: u32 = 5;
/// How long the last events may take when the shim ends.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// An event that a shim publishes: message and topic.
pub trait Event: MessageFull {
    /// containerd's topic.
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

/// The handle. Cheap to clone; all clones share one queue.
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
    /// Nobody listens at all: publishing is a no-op.
    closed: bool,
}

impl Shared {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock()
    }
}

impl Publisher {
    /// A publisher into `namespace`, and the future that delivers by `way` until `ended`. Who spawns the future owns it.
    pub fn new(
        way: Way,
        namespace: &str,
        ended: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue {
                closed: way == Way::Nowhere,
                ..Queue::default()
            }),
            changed: Notify::new(),
        });
        let publisher = Self {
            shared: shared.clone(),
            namespace: namespace.into(),
        };
        (publisher, deliver(shared, way, ended))
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Queues an event. Never waits.
    pub fn publish<E: Event>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(topic = E::TOPIC, error = %Report(&error), "event cannot be encoded");
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
        if queue.events.len() == QUEUE_LIMIT {
            queue.events.pop_front();
            queue.dropped += 1;
            if queue.dropped.is_power_of_two() {
                tracing::warn!(
                    dropped = queue.dropped,
                    "nobody takes events; the oldest are dropped"
                );
            }
        }
        queue.events.push_back(envelope);
        drop(queue);
        self.shared.changed.notify_one();
    }
}

async fn deliver(shared: Arc<Shared>, way: Way, ended: CancellationToken) {
    let send = send_all(&shared, way);
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
            if tokio::time::timeout(FLUSH_LIMIT, flushed).await.is_err() {
                let left = shared.queue().events.len();
                tracing::warn!(left, "the shim ends with events that nobody took");
            }
        }
    }
}

async fn drained(shared: &Shared) {
    while !shared.queue().events.is_empty() {
        tokio::time::sleep(PAUSE_MIN / 5).await;
    }
}

/// Sends front to back, forever. An event leaves the queue when it was taken, so a reader of the queue's length knows.
async fn send_all(shared: &Shared, way: Way) {
    let mut sender = Sender::new(way);
    let mut pause = PAUSE_MIN;
    let mut refused = 0;
    loop {
        let Some(envelope) = shared.queue().events.front().cloned() else {
            shared.changed.notified().await;
            continue;
        };
        match sender.send(envelope).await {
            Ok(()) => refused = 0,
            Err(Failure::Refused(error)) if refused + 1 >= REFUSED_LIMIT => {
                tracing::warn!(error = %Report(&error), "an event was refused and is dropped");
                refused = 0;
            }
            Err(failure) => {
                if matches!(failure, Failure::Refused(_)) {
                    refused += 1;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
                continue;
            }
        }
        pause = PAUSE_MIN;
        shared.queue().events.pop_front();
    }
}

#[cfg(test)]
mod tests;
