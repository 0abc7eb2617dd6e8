//! The state that all parts of the shim share about its pod: [`Context`], [`Guest`], the [`Share`] trait and [`undo`].
//!
//! The bottom layer: containers, logs, blocks and the sandbox build on it; it knows none of them.

mod guest;
mod share;
pub mod undo;

pub use guest::Guest;
pub use share::Share;

use crate::events::Publisher;
use boxlite_proto::vmm::PodName;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use tokio_util::task::TaskTracker;

/// Facts and handles that every part of the shim holds.
#[derive(Clone)]
pub struct Context {
    /// The sandbox's id.
    pub id: Arc<str>,
    /// The sandbox's bundle.
    pub bundle: Arc<PathBuf>,
    /// Names of the pod, once they are known.
    pub pod: Arc<OnceLock<PodName>>,
    /// Events.
    pub publisher: Publisher,
    /// Owner of every task.
    pub tasks: TaskTracker,
    /// Pid reported for every task instead of its pid in the guest; 0 reports the guest's. Set for pods that a containerd
    /// made.
    pub host_pid: Arc<AtomicU32>,
    /// True if containers see the node's IPC objects, from the plan of the running VM.
    pub host_ipc: Arc<AtomicBool>,
}

impl Context {
    /// Returns whether containers see the node's IPC objects.
    pub fn host_ipc(&self) -> bool {
        self.host_ipc.load(Ordering::Relaxed)
    }

    /// Returns the pid to report for a process whose pid in the guest is `guest`.
    pub fn reported_pid(&self, guest: u32) -> u32 {
        match self.host_pid.load(Ordering::Relaxed) {
            0 => guest,
            host => host,
        }
    }
}
