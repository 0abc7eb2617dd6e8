//! [`Turn`]: the right of a conversion to use the CPU.
//!
//! Waiting for bytes gives it up, so that a slow registry delays only its own images. Turns go round in the order of the
//! requests, and a conversion that has bytes all the time passes its turn on after [`TURN_DURATION`]. Blocks; used on the
//! conversion's thread.

use boxlite_sys::sync::Mutex;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Time after which a turn is offered to other conversions.
const TURN_DURATION: Duration = Duration::from_millis(200);

/// The turn of one conversion. Clones share it.
#[derive(Clone)]
pub(super) struct Turn {
    turns: Arc<Semaphore>,
    held: Arc<Mutex<Option<(OwnedSemaphorePermit, Instant)>>>,
}

impl Turn {
    pub(super) fn new(turns: Arc<Semaphore>) -> Self {
        Self {
            turns,
            held: Arc::default(),
        }
    }

    /// Takes the turn, and passes it on if it was held for long. Blocks; only for threads of `spawn_blocking`.
    pub(super) fn take(&self) {
        let mut held = self.held.lock();
        if let Some((_, since)) = &*held
            && since.elapsed() < TURN_DURATION
        {
            return;
        }
        // The semaphore gives a released permit to the first waiter.
        *held = None;
        // The semaphore is never closed.
        if let Ok(permit) = Handle::current().block_on(self.turns.clone().acquire_owned()) {
            *held = Some((permit, Instant::now()));
        }
    }

    /// Gives the turn up before a wait.
    pub(super) fn give_up(&self) {
        *self.held.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turn_passes_on_after_its_duration() {
        let turns = Arc::new(Semaphore::new(1));
        let (first, second) = (Turn::new(turns.clone()), Turn::new(turns.clone()));
        let holder = first.clone();
        tokio::task::spawn_blocking(move || holder.take())
            .await
            .unwrap();
        let waiting = second.clone();
        let waiter = tokio::task::spawn_blocking(move || waiting.take());
        // A holder that always has bytes: it asks again and again.
        let holder = first.clone();
        let busy = tokio::task::spawn_blocking(move || {
            let end = Instant::now() + 2 * TURN_DURATION;
            while Instant::now() < end {
                holder.take();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        waiter.await.unwrap();
        second.give_up();
        busy.await.unwrap();
        first.give_up();
        assert_eq!(turns.available_permits(), 1);
    }
}
