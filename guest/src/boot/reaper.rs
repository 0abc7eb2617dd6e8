//! Reaps every child of PID 1 and hands exits to who waits for them: [`Reaper`].
//!
//! As PID 1 the agent inherits every orphan of the VM's own PID namespace, so one `wait` loop must take them all and
//! nobody else may wait. Processes that matter are created stopped (before their exec), registered here, then released:
//! an exit can't be missed. The one gap, a process that is killed before it is registered, is closed by a short memory of
//! exits nobody had asked for.

use boxlite_sys::sync::Mutex;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions, WaitStatus, wait, waitid};
use std::collections::{HashMap, VecDeque};
use std::sync::MutexGuard;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawExit {
    /// 0–255; a death by signal is 128 + signal.
    pub code: u32,
    /// 0 where it ended by itself.
    pub signal: u32,
    /// Wall clock when it was reaped, ns since the epoch.
    pub at_unix_ns: i64,
}

/// Exits kept for somebody who registers late. Between a helper's report of a pid and its registration only a handful of
/// other processes can end.
const REMEMBERED_EXITS: usize = 256;

#[derive(Debug, Default)]
struct Table {
    waiting: HashMap<i32, oneshot::Sender<RawExit>>,
    unclaimed: VecDeque<(i32, RawExit)>,
}

/// The table of those who wait for an exit.
#[derive(Debug, Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

impl Reaper {
    /// Starts catching SIGCHLD; call before the first child is made.
    ///
    /// # Errors
    /// The signal handler could not be installed.
    pub fn subscribe() -> std::io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps until the runtime ends. Owned by the agent's main task.
    pub async fn run(&self, mut children: Signal) {
        loop {
            self.reap();
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    /// The exit of `pid`, a child of PID 1 that was made but not yet released. Dropping the receiver forgets it.
    pub fn register(&self, pid: i32) -> oneshot::Receiver<RawExit> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.lock();
        let gone = Pid::from_raw(pid).is_none_or(|pid| {
            // Without waiting and without reaping: is it still a child of ours?
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            matches!(
                waitid(WaitId::Pid(pid), options),
                Err(rustix::io::Errno::CHILD)
            )
        });
        // The latest exit of that number is its own, since the number can't have been given out again meanwhile and
        // reaping is done under the same lock.
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

    /// Takes all exits there are.
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
                    if table.unclaimed.len() >= REMEMBERED_EXITS {
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
