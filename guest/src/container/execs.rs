//! [`Execs`]: the exec'd processes of a container by id.

use super::error::ContainerError;
use crate::execution::Process;
use boxlite_sys::sync::Mutex;
use futures::future::{BoxFuture, Shared};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

/// A process that is being created or exists; all callers with its id share it.
pub(crate) type Slot = Shared<BoxFuture<'static, Result<Arc<Process>, Arc<ContainerError>>>>;

/// The execs of a container by id.
#[derive(Debug, Default)]
pub(crate) struct Execs {
    slots: Mutex<HashMap<String, Slot>>,
    /// Number of the next exec's cgroup.
    next: AtomicU64,
}

impl Execs {
    /// Returns the process with that id, waiting while it is being created.
    pub(crate) async fn get(&self, id: &str) -> Result<Arc<Process>, ContainerError> {
        let slot = self.lock().get(id).cloned();
        match slot {
            Some(slot) => Ok(slot.await?),
            None => Err(ContainerError::NotFound {
                what: "exec",
                id: id.to_owned(),
            }),
        }
    }

    /// Locks the map.
    pub(crate) fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock()
    }

    /// Returns a number that no other exec of the container has had.
    pub(crate) fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}
