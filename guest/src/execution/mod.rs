//! Processes of containers, whatever started them: output, input, exit.
//!
//! A [`Process`] is made by [`crate::container`] (init process and exec alike) from what the spawner hands over. Its one
//! task, [`supervise`], owns pump and exit: it ends when the process has ended *and* its output was read.

pub mod input;
pub mod output;
pub mod stdio;

use crate::boot::reaper::RawExit;
use crate::cgroup::Cgroup;
use crate::descriptor::AsyncDescriptor;
use boxlite_proto::boxlite::v1::{Exit, OutputStream};
use input::Input;
use output::{Filled, Output};
use rustix::process::{Pid, Signal, kill_process};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// After a process has ended, silence of this length on a pipe that something else still holds counts as its end. What
/// the process itself wrote is in the pipe by then and is read first.
const DRAIN_SILENCE: Duration = Duration::from_millis(200);
/// How many such intervals with output in each are waited for: children left behind may write for ever.
const DRAIN_ROUNDS: u32 = 10;

/// A process of a container.
#[derive(Debug)]
pub struct Process {
    /// In the VM's own numbering.
    pub pid: i32,
    /// What it wrote.
    pub output: Arc<Output>,
    /// What it reads.
    pub input: Input,
    /// The terminal's master, where it has one.
    pub terminal: Option<Arc<AsyncDescriptor>>,
    /// Where it, and what it starts, lives.
    pub cgroup: Cgroup,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// A process that was registered with the reaper and not yet released.
    pub fn new(
        pid: i32,
        input: Input,
        terminal: Option<Arc<AsyncDescriptor>>,
        cgroup: Cgroup,
    ) -> Self {
        Self {
            pid,
            output: Arc::default(),
            input,
            terminal,
            cgroup,
            exit: watch::Sender::new(None),
        }
    }

    /// Its exit, if it has ended.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its exit. Safe to drop; the wait lasts as long as the process, the caller brings the deadline.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or_default(),
            // The sender is in `self`.
            Err(_) => Exit::default(),
        }
    }

    /// Signals the process itself. Its number is its own as long as it was not reaped; an exit that is known makes this a
    /// no-op.
    pub fn kill(&self, signal: Signal) -> std::io::Result<()> {
        let pid = Pid::from_raw(self.pid).filter(|_| self.exit().is_none());
        match pid.map(|pid| kill_process(pid, signal)) {
            None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
            Some(Err(errno)) => Err(errno.into()),
        }
    }

    /// Makes its exit known.
    pub fn set_exit(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }
}

/// Follows a process to its end: pumps its output, and calls `on_exit` once with its exit, which makes the exit known.
/// Owned by the process's container.
pub async fn supervise(
    process: Arc<Process>,
    sources: Vec<(OutputStream, AsyncDescriptor)>,
    exit: oneshot::Receiver<RawExit>,
    on_exit: impl AsyncFnOnce(RawExit),
) {
    let pump = pump(&process.output, sources);
    tokio::pin!(pump);
    let ended = async {
        // The reaper lives as long as the agent; were it gone, the process would read as killed.
        let exit = exit.await.unwrap_or(RawExit {
            code: 137,
            signal: 9,
            at_unix_ns: crate::system::unix_time_ns(),
        });
        on_exit(exit).await;
    };
    tokio::pin!(ended);
    tokio::select! {
        () = &mut pump => ended.await,
        () = &mut ended => drain(&process.output, pump).await,
    }
    process.output.close();
    process.input.close().await;
}

/// Reads what is left. A slow reader is waited for without limit: its bytes are not dropped.
async fn drain(output: &Output, mut pump: impl Future<Output = ()> + Unpin) {
    let mut rounds = 0;
    while rounds < DRAIN_ROUNDS {
        let before = output.end();
        if tokio::time::timeout(DRAIN_SILENCE, &mut pump).await.is_ok() {
            return;
        }
        if !output.has_room() {
            continue;
        }
        if output.end() == before {
            return;
        }
        rounds += 1;
    }
}

/// Moves bytes from the descriptors to the buffer until all have ended.
async fn pump(output: &Output, sources: Vec<(OutputStream, AsyncDescriptor)>) {
    let streams = sources.into_iter().map(|(stream, source)| async move {
        loop {
            output.wait_for_room().await;
            match source.read_with(|fd| output.fill(stream, fd)).await {
                Ok(Filled::Bytes | Filled::NoRoom) => {}
                Ok(Filled::End) => return,
                Err(error) => {
                    tracing::warn!(%error, "read output");
                    return;
                }
            }
        }
    });
    futures::future::join_all(streams).await;
}
