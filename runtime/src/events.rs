//! Events of boxes and containers: drivers emit into the [`EventHub`], and each subscriber has an [`Events`].
//!
//! Each event carries the state of the box and its containers right after it, so that subscribers need no further
//! queries. Emitting does not wait: a subscriber that falls more than [`MAX_BACKLOG_EVENTS`] events behind gets an error,
//! and must list and subscribe again. The hub is independent of CRI; cri-server converts.
//!
//! Events are buffered until the first subscriber of this daemon arrives. They include one event for every box and
//! container that [`crate::recovery`] found. Exits during the absence of a daemon are thus reported, and events may be
//! repeated after a restart: delivery is at least once.

use crate::types::{BoxSnapshot, ContainerSnapshot};
use boxlite_sys::sync::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

/// Maximum backlog of a subscriber and of the buffer for the first one: about ten events per container of a full node.
pub const MAX_BACKLOG_EVENTS: usize = 4096;

/// Kind of an event; the names are CRI's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// It was created.
    Created,
    /// It was started.
    Started,
    /// It has ended.
    Stopped,
    /// It was removed.
    Deleted,
}

/// An event.
#[derive(Debug, Clone)]
pub struct BoxEvent {
    /// Kind.
    pub kind: EventKind,
    /// Id of the container or of the box itself.
    pub id: String,
    /// Time in ns since the epoch.
    pub at_ns: i64,
    /// State of the box and its containers right after the event.
    pub state: Arc<EventState>,
}

/// State of a box and its containers; shared by simultaneous events.
#[derive(Debug)]
pub struct EventState {
    /// The box.
    pub sandbox: BoxSnapshot,
    /// Its containers, by id.
    pub containers: Vec<ContainerSnapshot>,
}

/// Distributes events from drivers to subscribers.
#[derive(Debug)]
pub(crate) struct EventHub {
    inner: Mutex<Inner>,
    closing: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    sender: broadcast::Sender<BoxEvent>,
    /// Buffer for the first subscriber; `None` once it has subscribed.
    waiting: Option<VecDeque<BoxEvent>>,
}

impl EventHub {
    /// Returns a hub whose subscriptions end with `closing`.
    pub(crate) fn new(closing: CancellationToken) -> Self {
        Self {
            inner: Mutex::new(Inner {
                sender: broadcast::channel(MAX_BACKLOG_EVENTS).0,
                waiting: Some(VecDeque::new()),
            }),
            closing,
        }
    }

    /// Sends an event to all subscribers without waiting.
    pub(crate) fn emit(&self, event: BoxEvent) {
        let mut inner = self.lock();
        match &mut inner.waiting {
            Some(waiting) => {
                if waiting.len() == MAX_BACKLOG_EVENTS {
                    waiting.pop_front();
                }
                waiting.push_back(event);
            }
            // An error means that there is no subscriber at the moment.
            None => drop(inner.sender.send(event)),
        }
    }

    /// Subscribes to all further events; the first subscriber also gets the buffered ones.
    pub(crate) fn subscribe(&self) -> Events {
        let mut inner = self.lock();
        Events {
            waiting: inner.waiting.take().unwrap_or_default(),
            receiver: inner.sender.subscribe(),
            closing: self.closing.clone(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

/// A subscription. Dropping it unsubscribes.
#[derive(Debug)]
pub struct Events {
    waiting: VecDeque<BoxEvent>,
    receiver: broadcast::Receiver<BoxEvent>,
    closing: CancellationToken,
}

/// Reason for the end of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventsEnd {
    /// The subscriber was too slow.
    #[error(
        "subscriber missed {missed} events (maximum backlog {MAX_BACKLOG_EVENTS}): list and subscribe again"
    )]
    Behind {
        /// Number of lost events.
        missed: u64,
    },
    /// The runtime shuts down.
    #[error("the runtime is shutting down")]
    Closing,
}

impl Events {
    /// Waits for the next event. Cancel-safe.
    ///
    /// # Errors
    /// [`EventsEnd`].
    pub async fn next(&mut self) -> Result<BoxEvent, EventsEnd> {
        if let Some(event) = self.waiting.pop_front() {
            return Ok(event);
        }
        tokio::select! {
            biased;
            received = self.receiver.recv() => match received {
                Ok(event) => Ok(event),
                Err(broadcast::error::RecvError::Lagged(missed)) => Err(EventsEnd::Behind { missed }),
                Err(broadcast::error::RecvError::Closed) => Err(EventsEnd::Closing),
            },
            () = self.closing.cancelled() => Err(EventsEnd::Closing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::StageTimers;
    use crate::types::{BoxOptions, BoxState};
    use boxlite_proto::vmm::VmmKind;

    fn event(id: usize) -> BoxEvent {
        let options = BoxOptions {
            pod: None,
            id: "b".into(),
            name: "b".into(),
            metadata: Vec::new(),
            vcpus: 1,
            memory_mib: 1,
            containers_bytes: 0,
            scratch_bytes: 0,
            hostname: String::new(),
            netns: None,
            host_network: false,
            passt: false,
            sysctls: Default::default(),
            cgroup_parent: String::new(),
            vmm: None,
            debug_console: false,
            shared_volume_writers: Default::default(),
            vmm_ids: None,
        };
        let sandbox = BoxSnapshot {
            id: "b".into(),
            name: "b".into(),
            state: BoxState::Ready,
            reason: String::new(),
            created_at_ns: 0,
            metadata: Vec::new(),
            timers: StageTimers::default(),
            vmm: VmmKind::Qemu,
            shim_pid: None,
            metrics: Default::default(),
            options,
        };
        BoxEvent {
            kind: EventKind::Created,
            id: id.to_string(),
            at_ns: 0,
            state: Arc::new(EventState {
                sandbox,
                containers: Vec::new(),
            }),
        }
    }

    async fn ids(events: &mut Events, count: usize) -> Vec<String> {
        let mut ids = Vec::new();
        for _ in 0..count {
            ids.push(events.next().await.unwrap().id);
        }
        ids
    }

    #[tokio::test]
    async fn subscribe_gives_buffered_events_to_first_only() {
        let hub = EventHub::new(CancellationToken::new());
        hub.emit(event(1));
        hub.emit(event(2));
        let (mut first, mut second) = (hub.subscribe(), hub.subscribe());
        hub.emit(event(3));
        assert_eq!(ids(&mut first, 3).await, ["1", "2", "3"]);
        assert_eq!(ids(&mut second, 1).await, ["3"]);
    }

    #[tokio::test]
    async fn emit_does_not_wait_for_slow_subscriber() {
        let closing = CancellationToken::new();
        let hub = EventHub::new(closing.clone());
        let (mut slow, mut fast) = (hub.subscribe(), hub.subscribe());
        for number in 0..MAX_BACKLOG_EVENTS + 5 {
            hub.emit(event(number));
            assert_eq!(fast.next().await.unwrap().id, number.to_string());
        }
        assert!(matches!(
            slow.next().await,
            Err(EventsEnd::Behind { missed }) if missed >= 5
        ));
        closing.cancel();
        assert!(matches!(fast.next().await, Err(EventsEnd::Closing)));
    }

    #[tokio::test]
    async fn emit_bounds_buffer_without_subscriber() {
        let hub = EventHub::new(CancellationToken::new());
        for number in 0..MAX_BACKLOG_EVENTS + 1 {
            hub.emit(event(number));
        }
        let mut events = hub.subscribe();
        assert_eq!(events.waiting.len(), MAX_BACKLOG_EVENTS);
        assert_eq!(events.next().await.unwrap().id, "1");
    }
}
