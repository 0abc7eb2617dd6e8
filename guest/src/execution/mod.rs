//! Processes of containers: output, input, exit.
//!
//! [`crate::container`] creates a [`Process`] (init or exec) from the descriptors returned by the spawner. A single
//! task, [`supervise`], pumps output and handles the exit; it ends when the process has exited *and* its output was
//! read.

pub(crate) mod input;
pub(crate) mod output;
pub(crate) mod stdio;

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

/// After a process has exited, a pipe still held open by others counts as closed after this time without output.
/// Output of the process itself is in the pipe by then and is read first.
const DRAIN_QUIET_INTERVAL: Duration = Duration::from_millis(200);
/// Maximum number of such intervals with output; remaining children may write forever.
const MAX_DRAIN_INTERVALS: u32 = 10;

/// A process of a container.
#[derive(Debug)]
pub(crate) struct Process {
    /// PID in the VM's initial PID namespace.
    pub pid: i32,
    /// Output of the process.
    pub output: Arc<Output>,
    /// Input of the process.
    pub input: Input,
    /// The terminal's master, if the process has one.
    pub terminal: Option<Arc<AsyncDescriptor>>,
    /// Cgroup of the process and its descendants.
    pub cgroup: Cgroup,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    /// Creates a process that was registered with the reaper and not yet released.
    pub(crate) fn new(
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

    /// Returns the exit, if the process has ended.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for the exit. Cancel-safe; there is no timeout.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or_default(),
            // The sender is owned by `self`.
            Err(_) => Exit::default(),
        }
    }

    /// Signals the process. Its PID is not reused before it is reaped; once the exit is known this is a no-op.
    pub(crate) fn kill(&self, signal: Signal) -> std::io::Result<()> {
        let pid = Pid::from_raw(self.pid).filter(|_| self.exit().is_none());
        match pid.map(|pid| kill_process(pid, signal)) {
            None | Some(Ok(()) | Err(rustix::io::Errno::SRCH)) => Ok(()),
            Some(Err(errno)) => Err(errno.into()),
        }
    }

    /// Publishes the exit.
    pub(crate) fn set_exit(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }
}

/// Follows a process until its end: pumps its output, and calls `on_exit` once with its exit. Runs in the agent's
/// task tracker.
pub(crate) async fn supervise(
    process: Arc<Process>,
    sources: Vec<(OutputStream, AsyncDescriptor)>,
    exit: oneshot::Receiver<RawExit>,
    on_exit: impl AsyncFnOnce(RawExit),
) {
    let pump = pump(&process.output, sources);
    tokio::pin!(pump);
    let ended = async {
        // The reaper lives as long as the agent; if it were gone, the process would count as killed.
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

/// Reads the remaining output. A slow reader is waited for without limit, so its bytes are not dropped.
async fn drain(output: &Output, mut pump: impl Future<Output = ()> + Unpin) {
    let mut rounds = 0;
    while rounds < MAX_DRAIN_INTERVALS {
        let before = output.end();
        if tokio::time::timeout(DRAIN_QUIET_INTERVAL, &mut pump)
            .await
            .is_ok()
        {
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

/// Copies bytes from the descriptors to the buffer until all have ended.
async fn pump(output: &Output, sources: Vec<(OutputStream, AsyncDescriptor)>) {
    let streams = sources.into_iter().map(|(stream, source)| async move {
        loop {
            output.wait_for_room().await;
            match source.read_with(|fd| output.fill(stream, fd)).await {
                Ok(Filled::Bytes | Filled::NoRoom) => {}
                Ok(Filled::End) => return,
                Err(error) => {
                    tracing::warn!(%error, "failed to read output");
                    return;
                }
            }
        }
    });
    futures::future::join_all(streams).await;
}
