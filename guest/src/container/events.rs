//! [`Events`]: bounded log of container events with sequence numbers, followed by readers.

use crate::system::unix_time_ns;
use boxlite_proto::boxlite::v1::{ContainerEvent, container_event::Event};
use boxlite_sys::sync::Mutex;
use std::collections::VecDeque;
use std::sync::MutexGuard;
use tokio::sync::Notify;

/// Maximum number of events kept. A reader that falls further behind sees a gap in the sequence numbers; states and
/// exits can still be listed.
const MAX_EVENTS: usize = 1024;

#[derive(Debug, Default)]
struct Log {
    kept: VecDeque<ContainerEvent>,
    last: u64,
}

/// Log of container events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    log: Mutex<Log>,
    added: Notify,
}

impl Events {
    /// Adds an event. `exec_id` is empty for the container's init process.
    pub(crate) fn add(&self, container_id: &str, exec_id: &str, event: Event) {
        let mut log = self.lock();
        log.last += 1;
        if log.kept.len() >= MAX_EVENTS {
            log.kept.pop_front();
        }
        let event = ContainerEvent {
            sequence: log.last,
            time_unix_ns: unix_time_ns(),
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            event: Some(event),
        };
        log.kept.push_back(event);
        drop(log);
        self.added.notify_waiters();
    }

    /// Returns the first kept event with a sequence number of at least `from`, waiting for it if needed. Cancel-safe.
    pub(crate) async fn next(&self, from: u64) -> ContainerEvent {
        loop {
            let added = self.added.notified();
            tokio::pin!(added);
            added.as_mut().enable();
            if let Some(event) = self.lock().kept.iter().find(|event| event.sequence >= from) {
                return event.clone();
            }
            added.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boxlite_proto::boxlite::v1::Exit;

    #[tokio::test]
    async fn next_resumes_by_number_and_skips_dropped_events() {
        let events = Events::default();
        for _ in 0..MAX_EVENTS + 10 {
            events.add("c", "", Event::Exit(Exit::default()));
        }
        assert_eq!(events.next(0).await.sequence, 11);
        assert_eq!(events.next(500).await.sequence, 500);
        let last = (MAX_EVENTS + 10) as u64;
        let waiting = events.next(last + 1);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        events.add("c", "x", Event::Exit(Exit::default()));
        assert_eq!(waiting.await.exec_id, "x");
    }
}
