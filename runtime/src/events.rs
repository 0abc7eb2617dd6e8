//! What happens to boxes and containers, for everybody who wants to follow it: [`EventHub`] takes it from the drivers,
//! [`Events`] is one follower's end.
//!
//! Each event carries the box and its containers as they were right after it, so a follower need not ask. Nothing here
//! waits for a follower: one that falls more than [`KEPT`] events behind is told so, and has to look at the lists and
//! follow anew. The hub knows no CRI; cri-server converts.
//!
//! Before the first follower of this daemon comes, events are kept for it: among them those of [`crate::recovery`], one
//! for every box and container found again. So what ended while no daemon lived is told, and what was told to a
//! connection that the death cut is told again: at least once, never not at all.

use crate::types::{BoxSnapshot, ContainerSnapshot};
use boxlite_sys::sync::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

/// Events a follower may be behind, and most that wait for the first one: some ten for each container of a full node.
pub const KEPT: usize = 4096;

/// What happened; the names are CRI's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// It is there.
    Created,
    /// It runs.
    Started,
    /// It ended.
    Stopped,
    /// It is gone.
    Deleted,
}

/// One event.
#[derive(Debug, Clone)]
pub struct BoxEvent {
    /// What happened.
    pub kind: EventKind,
    /// To which container, or to the box itself.
    pub id: String,
    /// When, in ns since the epoch.
    pub at_ns: i64,
    /// The box and its containers right after it.
    pub state: Arc<EventState>,
}

/// See [`BoxEvent::state`]. Events of one moment share it.
#[derive(Debug)]
pub struct EventState {
    /// The box.
    pub sandbox: BoxSnapshot,
    /// Its containers, by id.
    pub containers: Vec<ContainerSnapshot>,
}

/// Where drivers tell and followers subscribe.
#[derive(Debug)]
pub(crate) struct EventHub {
    inner: Mutex<Inner>,
    closing: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    sender: broadcast::Sender<BoxEvent>,
    /// For the first follower; `None` once it came.
    waiting: Option<VecDeque<BoxEvent>>,
}

impl EventHub {
    /// A hub whose followers end with `closing`.
    pub fn new(closing: CancellationToken) -> Self {
        Self {
            inner: Mutex::new(Inner {
                sender: broadcast::channel(KEPT).0,
                waiting: Some(VecDeque::new()),
            }),
            closing,
        }
    }

    /// Tells everybody; never waits.
    pub fn tell(&self, event: BoxEvent) {
        let mut inner = self.lock();
        match &mut inner.waiting {
            Some(waiting) => {
                if waiting.len() == KEPT {
                    waiting.pop_front();
                }
                waiting.push_back(event);
            }
            // No follower at this moment: nobody to tell.
            None => drop(inner.sender.send(event)),
        }
    }

    /// A follower, of everything from now on; the first one gets what waited too.
    pub fn follow(&self) -> Events {
        let mut inner = self.lock();
        Events {
            waiting: inner.waiting.take().unwrap_or_default(),
            receiver: inner.sender.subscribe(),
            closing: self.closing.clone(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Plain data: a panic elsewhere left it whole.
        self.inner.lock()
    }
}

/// One follower's end. Dropping it ends the following.
#[derive(Debug)]
pub struct Events {
    waiting: VecDeque<BoxEvent>,
    receiver: broadcast::Receiver<BoxEvent>,
    closing: CancellationToken,
}

/// Why there is no next event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EventsEnd {
    /// The follower was too slow.
    #[error(
        "{missed} events were missed: at most {KEPT} are kept for a follower; list, and follow anew"
    )]
    Behind {
        /// How many are lost to it.
        missed: u64,
    },
    /// The runtime goes down.
    #[error("the runtime is shutting down")]
    Closing,
}

impl Events {
    /// The next event; waits for it. Cancel-safe.
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
            id: "b".into(),
            name: "b".into(),
            metadata: Vec::new(),
            vcpus: 1,
            memory_mib: 1,
            scratch_bytes: 0,
            hostname: String::new(),
            netns: None,
            host_network: false,
            sysctls: Default::default(),
            cgroup_parent: String::new(),
            vmm: None,
            debug_console: false,
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
    async fn the_first_follower_gets_what_waited_and_the_second_does_not() {
        let hub = EventHub::new(CancellationToken::new());
        hub.tell(event(1));
        hub.tell(event(2));
        let (mut first, mut second) = (hub.follow(), hub.follow());
        hub.tell(event(3));
        assert_eq!(ids(&mut first, 3).await, ["1", "2", "3"]);
        assert_eq!(ids(&mut second, 1).await, ["3"]);
    }

    #[tokio::test]
    async fn a_slow_follower_slows_nobody_and_is_told() {
        let closing = CancellationToken::new();
        let hub = EventHub::new(closing.clone());
        let (mut slow, mut fast) = (hub.follow(), hub.follow());
        for number in 0..KEPT + 5 {
            hub.tell(event(number));
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
    async fn what_waits_is_bounded() {
        let hub = EventHub::new(CancellationToken::new());
        for number in 0..KEPT + 1 {
            hub.tell(event(number));
        }
        let mut events = hub.follow();
        assert_eq!(events.waiting.len(), KEPT);
        assert_eq!(events.next().await.unwrap().id, "1");
    }
}
