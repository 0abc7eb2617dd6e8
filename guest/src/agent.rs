//! [`Agent`]: what all services share, for the life of the VM.

use crate::boot::reaper::Reaper;
use crate::container::pod::Pod;
use crate::spawner::Spawner;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

/// The agent's state. One per VM, behind an `Arc`.
#[derive(Debug)]
pub struct Agent {
    /// Takes every exit of the VM.
    pub reaper: Reaper,
    /// Makes processes.
    pub spawner: Spawner,
    /// The pod's containers.
    pub pod: Arc<Pod>,
    /// Owns the tasks that outlast a call: they make containers and follow processes.
    pub tasks: TaskTracker,
    initialized: AtomicBool,
    shutdown: Notify,
}

impl Agent {
    /// An agent of a VM that has no pod yet.
    pub fn new(spawner: Spawner) -> Self {
        Self {
            reaper: Reaper::default(),
            spawner,
            pod: Arc::default(),
            tasks: TaskTracker::new(),
            initialized: AtomicBool::new(false),
            shutdown: Notify::new(),
        }
    }

    /// Notes that the pod's mounts and network are there.
    pub fn set_initialized(&self) {
        self.initialized.store(true, Ordering::Release);
    }

    /// Whether containers can be made.
    pub fn is_initialized(&self) -> bool {
        self.initialized.load(Ordering::Acquire)
    }

    /// Lets [`Self::shut_down`] return.
    pub fn request_shutdown(&self) {
        self.shutdown.notify_one();
    }

    /// Waits until the VM is to power off.
    pub async fn shut_down(&self) {
        self.shutdown.notified().await;
    }
}
