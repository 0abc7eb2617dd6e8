//! [`Agent`]: state shared by all services for the lifetime of the VM.

use crate::container::launcher::Launcher;
use crate::container::pod::Pod;
use crate::spawner::Spawner;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;

/// The agent's state; one per VM.
#[derive(Debug)]
pub(crate) struct Agent {
    /// The pod's containers.
    pub pod: Arc<Pod>,
    initialized: AtomicBool,
    shutdown: Notify,
}

impl Agent {
    /// Creates the agent of a VM whose pod is not initialized.
    pub(crate) fn new(spawner: Spawner) -> Self {
        Self {
            pod: Arc::new(Pod::new(Launcher::new(spawner))),
            initialized: AtomicBool::new(false),
            shutdown: Notify::new(),
        }
    }

    /// Returns the spawner, the reaper and the task tracker.
    pub(crate) fn launcher(&self) -> &Launcher {
        &self.pod.context.launcher
    }

    /// Records that the pod's mounts and network are set up.
    pub(crate) fn set_initialized(&self) {
        self.initialized.store(true, Ordering::Release);
    }

    /// Returns whether containers can be created.
    pub(crate) fn is_initialized(&self) -> bool {
        self.initialized.load(Ordering::Acquire)
    }

    /// Makes [`Self::shut_down`] return.
    pub(crate) fn request_shutdown(&self) {
        self.shutdown.notify_one();
    }

    /// Waits until the VM is to power off.
    pub(crate) async fn shut_down(&self) {
        self.shutdown.notified().await;
    }
}
