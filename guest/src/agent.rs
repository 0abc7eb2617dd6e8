//! [`Agent`]: what all services share, for the life of the VM.

use crate::boot::reaper::Reaper;
use tokio::sync::Notify;

/// The agent's state. One per VM, behind an `Arc`.
#[derive(Debug)]
pub struct Agent {
    /// Takes every exit of the VM.
    pub reaper: Reaper,
    shutdown: Notify,
}

impl Agent {
    /// An agent of a VM that has no pod yet.
    pub fn new() -> Self {
        Self {
            reaper: Reaper::default(),
            shutdown: Notify::new(),
        }
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
