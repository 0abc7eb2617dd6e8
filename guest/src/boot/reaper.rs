//! Reaps every child of PID 1 and delivers exits to registered waiters: [`Reaper`].
//!
//! As PID 1 the agent inherits every orphan of the VM's initial PID namespace, so a single `wait` loop must reap them
//! all and no other code may call wait. Processes of interest are created stopped (before their exec), registered
//! here, then released, so no exit is missed. A process killed before it is registered is covered by a short list of
//! unclaimed exits.

use boxlite_sys::sync::Mutex;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions, WaitStatus, wait, waitid};
use std::collections::{HashMap, VecDeque};
use std::sync::MutexGuard;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Exit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawExit {
    /// 0–255; a death by signal is 128 + signal.
    pub code: u32,
    /// 0 if the process exited by itself.
    pub signal: u32,
    /// Wall clock at the time of reaping, in ns since the epoch.
    pub at_unix_ns: i64,
}

/// Number of unclaimed exits kept for late registrations. Few processes can end between a helper's report of a PID
/// and its registration.
const MAX_UNCLAIMED_EXITS: usize = 256;

#[derive(Debug, Default)]
struct Table {
    waiting: HashMap<i32, oneshot::Sender<RawExit>>,
    unclaimed: VecDeque<(i32, RawExit)>,
}

/// Waiters by PID, and recent unclaimed exits.
#[derive(Debug, Default)]
pub(crate) struct Reaper {
    table: Mutex<Table>,
}

impl Reaper {
    /// Installs the SIGCHLD handler. Must be called before the first child is created.
    ///
    /// # Errors
    /// If the signal handler could not be installed.
    pub(crate) fn subscribe() -> std::io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps until the runtime ends. Runs in the agent's main task.
    pub(crate) async fn run(&self, mut children: Signal) {
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    /// Returns the exit of `pid`, a child of PID 1 that was created but not released. Dropping the receiver removes
    /// the registration.
    pub(crate) fn register(&self, pid: i32) -> oneshot::Receiver<RawExit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.lock();
        let gone = Pid::from_raw(pid).is_none_or(|pid| {
            // Checks without reaping whether it is still a child.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            matches!(
                waitid(WaitId::Pid(pid), options),
                Err(rustix::io::Errno::CHILD)
            )
        });
        // The latest exit with this PID is the right one: the PID cannot have been reused in the meantime, and
        // reaping holds the same lock.
        let exit = table
            .unclaimed
            .iter()
            .rev()
            .find(|(number, _)| *number == pid)
            .map(|(_, exit)| *exit);
        table.unclaimed.retain(|(number, _)| *number != pid);
        match exit.filter(|_| gone) {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                table.waiting.insert(pid, sender);
            }
        }
        receiver
    }

    /// Reaps all exited children.
    fn reap(&self) {
        let mut table = self.lock();
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let exit = exit_of(status);
            let pid = pid.as_raw_nonzero().get();
            match table.waiting.remove(&pid) {
                Some(sender) => {
                    let _ = sender.send(exit);
                }
                None => {
                    if table.unclaimed.len() >= MAX_UNCLAIMED_EXITS {
                        table.unclaimed.pop_front();
                    }
                    table.unclaimed.push_back((pid, exit));
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }
}

fn exit_of(status: WaitStatus) -> RawExit {
    let signal = status.terminating_signal().unwrap_or(0).unsigned_abs();
    let code = match status.exit_status() {
        Some(code) => code.unsigned_abs() & 0xff,
        None => 128 + signal,
    };
    RawExit {
        code,
        signal,
        at_unix_ns: crate::system::unix_time_ns(),
    }
}
