//! [`Process`]: a handle to one process in the guest (a container's init or an exec), and the task that owns its state.
//!
//! The task starts, signals and deletes the process and publishes its events, so events appear in the order of state
//! changes. [`crate::logs`] handles output; an exit is published only after the output was drained.
//!
//! ```text
//! Created ──start──► Running ⇄ Paused ──exit + output drained, VM died──► Stopped ──delete──► gone
//!    └──────────────────────────────delete, kill of an exec────────────────┘
//! ```

use crate::error::{Result, ShimError};
use crate::logs::input::Input;
use crate::logs::{LogPump, Sink, Stdio};
use crate::pod::{Context, Guest};
use crate::time;
use crate::trace::GuestCall;
use boxlite_portal::PortalError;
use boxlite_proto::boxlite::v1::{ExecRequest, Exit};
use boxlite_sys::ask::ask;
use boxlite_sys::report::Report;
use boxlite_telemetry::{TraceContext, WithTrace};
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use futures::future::BoxFuture;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// Capacity of the task's request channel.
const REQUEST_CHANNEL_CAPACITY: usize = 32;
/// Delay before Execution.Wait is retried after a broken connection.
const WAIT_RETRY_DELAY: Duration = Duration::from_millis(200);
/// Time without progress after which draining a process's output stops; a child may hold the pipe open forever.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum interval between two TaskOOM events of a container. A guest may report OOM kills without end; one event says as much
/// to the receivers as many.
const MIN_OOM_INTERVAL: Duration = Duration::from_secs(1);
/// Exit status of a process that died with its VM: 128 + SIGKILL.
const KILLED_EXIT_STATUS: u32 = 137;
/// Exit status if the real one is unknown; containerd's UnknownExitStatus.
const UNKNOWN_EXIT_STATUS: u32 = 255;

/// Lifecycle phase of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Registered, not started.
    Created,
    /// Running.
    Running,
    /// Frozen with its container.
    Paused,
    /// Exited, output drained.
    Stopped,
}

/// Exit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Exit status, 0–255; 128 + signal number if a signal killed the process.
    pub status: u32,
    /// Nanoseconds since the epoch, by the host's clock.
    pub at_unix_ns: i64,
}

/// State that the task publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Lifecycle phase.
    pub phase: Phase,
    /// Reported pid (see [`Context::reported_pid`]); 0 before an exec has started.
    pub pid: u32,
    /// Set in phase Stopped.
    pub ended: Option<Ended>,
}

/// Immutable properties of a process.
#[derive(Debug, Clone)]
pub struct ProcessConfig {
    /// Container id.
    pub container: String,
    /// Exec id; empty for the init process.
    pub exec: String,
    /// Bundle of the container.
    pub bundle: PathBuf,
    /// Requested input and output.
    pub stdio: Stdio,
}

impl ProcessConfig {
    /// Returns the id used in events and states: the exec id, or the container id for init.
    pub fn id(&self) -> &str {
        if self.exec.is_empty() {
            &self.container
        } else {
            &self.exec
        }
    }
}

type Reply<T> = oneshot::Sender<Result<T>>;

enum Request {
    Start(Reply<u32>, TraceContext),
    Kill {
        signal: u32,
        all: bool,
        reply: Reply<()>,
    },
    Pause(bool, Reply<()>),
    Resize {
        rows: u32,
        cols: u32,
        reply: Reply<()>,
    },
    CloseInput(Reply<()>),
    ReopenLog(Reply<()>),
    /// The guest's OOM killer killed a process of the container.
    Oom,
    Delete(Reply<State>),
    Close(oneshot::Sender<()>),
}

/// Handle to a process; clones share the task.
#[derive(Clone)]
pub struct Process {
    config: Arc<ProcessConfig>,
    requests: mpsc::Sender<Request>,
    state: watch::Receiver<State>,
}

impl Process {
    /// Spawns the task of a process: the init of a container that Container.Init created with `pid`, or an exec whose OCI
    /// process is `exec_json`.
    pub fn spawn(
        context: &Context,
        guest: &Guest,
        config: ProcessConfig,
        sink: Sink,
        pid: u32,
        exec_json: Option<Vec<u8>>,
    ) -> Self {
        let config = Arc::new(config);
        let (requests, receiver) = mpsc::channel(REQUEST_CHANNEL_CAPACITY);
        let initial = State {
            phase: Phase::Created,
            pid: if exec_json.is_none() {
                context.reported_pid(pid)
            } else {
                0
            },
            ended: None,
        };
        let (sender, state) = watch::channel(initial);
        let task = Task {
            context: context.clone(),
            guest: guest.clone(),
            config: config.clone(),
            requests: receiver,
            state: sender,
            sink: Some(sink),
            pump: None,
            input: None,
            exec_json,
            oom: OomLimit::default(),
            close_input: false,
            end: None,
        };
        context.tasks.spawn(task.run());
        Self {
            config,
            requests,
            state,
        }
    }

    /// Returns the immutable properties.
    pub fn config(&self) -> &ProcessConfig {
        &self.config
    }

    /// Returns the last published state.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Starts the process and returns its pid.
    ///
    /// # Errors
    /// WrongState unless the phase is Created, or the guest's error.
    pub async fn start(&self) -> Result<u32> {
        let trace = TraceContext::current();
        self.ask(|reply| Request::Start(reply, trace)).await
    }

    /// Sends a Linux signal, to the whole process tree with `all`.
    ///
    /// # Errors
    /// NotFound after the exit, as containerd expects, or the guest's error.
    pub async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        self.ask(|reply| Request::Kill { signal, all, reply }).await
    }

    /// Freezes (true) or thaws (false) the container.
    ///
    /// # Errors
    /// WrongState, or the guest's error.
    pub async fn pause(&self, pause: bool) -> Result<()> {
        self.ask(|reply| Request::Pause(pause, reply)).await
    }

    /// Sets the terminal size.
    ///
    /// # Errors
    /// The guest's error.
    pub async fn resize(&self, rows: u32, cols: u32) -> Result<()> {
        self.ask(|reply| Request::Resize { rows, cols, reply })
            .await
    }

    /// Closes the process's input.
    ///
    /// # Errors
    /// NotFound after the task has ended.
    pub async fn close_input(&self) -> Result<()> {
        self.ask(Request::CloseInput).await
    }

    /// Reopens the log file by its path; see [`LogPump::reopen`].
    ///
    /// # Errors
    /// Invalid without a log file; Io if the new file cannot be opened (the old one remains open).
    pub async fn reopen_log(&self) -> Result<()> {
        self.ask(Request::ReopenLog).await
    }

    /// Reports an OOM kill in the container. Ignored after the exit.
    pub async fn oom(&self) {
        // An error means that the task has ended and no event is due.
        drop(self.requests.send(Request::Oom).await);
    }

    /// Deletes the process in the guest and returns its final state.
    ///
    /// # Errors
    /// WrongState while it runs, or the guest's error.
    pub async fn delete(&self) -> Result<State> {
        self.ask(Request::Delete).await
    }

    /// Ends the task and its log writer. Does nothing after the task has ended.
    pub async fn close(&self) {
        // None means that the task has ended.
        let _: Option<()> = ask(&self.requests, Request::Close).await;
    }

    /// Waits for the exit. Cancel safe.
    ///
    /// # Errors
    /// NotFound if the process was deleted without an exit.
    pub async fn wait(&self) -> Result<Ended> {
        let mut state = self.state.clone();
        let gone = || ShimError::NotFound {
            kind: "process",
            id: self.config.id().to_owned(),
        };
        let state = state
            .wait_for(|state| state.ended.is_some())
            .await
            .map_err(|_| gone())?;
        state.ended.ok_or_else(gone)
    }

    /// Waits until the process is not running: exited, or not started.
    pub async fn wait_stopped(&self) {
        let mut state = self.state.clone();
        // An error means that the task has ended: settled too.
        drop(
            state
                .wait_for(|state| matches!(state.phase, Phase::Created | Phase::Stopped))
                .await,
        );
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let answer = ask(&self.requests, request).await;
        answer.ok_or_else(|| ShimError::NotFound {
            kind: "process",
            id: self.config.id().to_owned(),
        })?
    }
}

/// Limits the rate of a container's TaskOOM events.
#[derive(Debug, Default)]
struct OomLimit {
    /// Time of the last event.
    published: Option<Instant>,
}

impl OomLimit {
    /// Returns whether an event may be published now, and then counts it as published.
    fn allows(&mut self, now: Instant) -> bool {
        let due = self
            .published
            .is_none_or(|last| now.saturating_duration_since(last) >= MIN_OOM_INTERVAL);
        if due {
            self.published = Some(now);
        }
        due
    }
}

struct Task {
    context: Context,
    guest: Guest,
    config: Arc<ProcessConfig>,
    requests: mpsc::Receiver<Request>,
    state: watch::Sender<State>,
    /// Opened by Create, taken by Start.
    sink: Option<Sink>,
    pump: Option<LogPump>,
    input: Option<Input>,
    exec_json: Option<Vec<u8>>,
    oom: OomLimit,
    /// CloseIO arrived before Start.
    close_input: bool,
    /// Completes after the exit and the end of output.
    end: Option<BoxFuture<'static, (Ended, bool)>>,
}

impl Task {
    async fn run(mut self) {
        loop {
            let request = match &mut self.end {
                Some(end) => tokio::select! {
                    request = self.requests.recv() => request,
                    (ended, oom) = end => {
                        self.end = None;
                        self.ended(ended, oom);
                        continue;
                    }
                },
                None => tokio::select! {
                    request = self.requests.recv() => request,
                    // The VM ended before the process was started.
                    () = self.guest.ended.cancelled(), if self.state.borrow().ended.is_none() => {
                        self.ended(killed(), false);
                        continue;
                    }
                },
            };
            match request {
                None => return self.close().await,
                Some(Request::Close(reply)) => {
                    self.close().await;
                    let _ = reply.send(());
                    return;
                }
                Some(request) => self.serve(request).await,
            }
        }
    }

    async fn serve(&mut self, request: Request) {
        // A request is carried out even if its caller no longer waits for the reply.
        match request {
            Request::Start(reply, trace) => {
                let started = self.start().in_trace(trace).await;
                if started.is_err() && matches!(self.sink, Some(Sink::Fifos { .. })) {
                    // The client reads the FIFOs to EOF before it handles the failure.
                    self.sink = None;
                }
                drop(reply.send(started));
            }
            Request::Kill { signal, all, reply } => drop(reply.send(self.kill(signal, all).await)),
            Request::Pause(pause, reply) => drop(reply.send(self.pause(pause).await)),
            Request::Resize { rows, cols, reply } => {
                drop(reply.send(self.resize(rows, cols).await))
            }
            Request::CloseInput(reply) => {
                match &self.input {
                    Some(input) => input.close(),
                    // Not started yet: the client's input may have ended already.
                    None => self.close_input = true,
                }
                drop(reply.send(Ok(())));
            }
            Request::ReopenLog(reply) => self.reopen(reply),
            Request::Oom => self.oom(),
            Request::Delete(reply) => drop(reply.send(self.delete().await)),
            Request::Close(reply) => drop(reply.send(())),
        }
    }

    async fn start(&mut self) -> Result<u32> {
        if self.state.borrow().phase != Phase::Created {
            return Err(self.wrong_state("start it"));
        }
        let session = self.guest.session.clone();
        let config = self.config.clone();
        let pid = match &self.exec_json {
            None => {
                let call = GuestCall::begin("Container/Start");
                let containers = session.container();
                let starting = containers.start(&config.container, call.traced());
                let response = self.call(starting).await?;
                call.answered(&response.steps);
                response.pid
            }
            Some(json) => {
                let request = ExecRequest {
                    container_id: config.container.clone(),
                    exec_id: config.exec.clone(),
                    process_json: json.clone().into(),
                    terminal: config.stdio.terminal,
                    stdin: config.stdio.has_input(),
                };
                self.call(session.execution().exec(request)).await?
            }
        };
        let old = self.state.borrow().pid;
        let pid = if pid == 0 {
            old
        } else {
            self.context.reported_pid(pid)
        };
        self.state.send_modify(|state| {
            state.phase = Phase::Running;
            state.pid = pid;
        });
        if config.exec.is_empty() {
            self.context.publisher.publish(&TaskStart {
                container_id: config.container.clone(),
                pid,
                ..Default::default()
            });
        } else {
            self.context.publisher.publish(&TaskExecStarted {
                container_id: config.container.clone(),
                exec_id: config.exec.clone(),
                pid,
                ..Default::default()
            });
        }
        self.follow();
        Ok(pid)
    }

    /// Starts copying output and input and waiting for the exit.
    fn follow(&mut self) {
        let config = &self.config;
        if let Some(sink) = self.sink.take() {
            self.pump = Some(LogPump::spawn(
                &self.context,
                &self.guest,
                &config.container,
                &config.exec,
                sink,
            ));
        }
        self.input = Input::spawn(
            &self.context,
            &self.guest,
            &config.container,
            &config.exec,
            &config.stdio.stdin,
        );
        if let Some(input) = self.input.as_ref().filter(|_| self.close_input) {
            input.close();
        }
        let drained = self.pump.as_ref().map(LogPump::watch_drained);
        let guest = self.guest.clone();
        let config = self.config.clone();
        self.end = Some(Box::pin(async move {
            let (ended, oom) = wait_for_exit(&guest, &config).await;
            if let Some(drained) = drained
                && !drained.within(DRAIN_TIMEOUT).await
            {
                tracing::warn!(
                    container = config.container,
                    exec = config.exec,
                    timeout = ?DRAIN_TIMEOUT,
                    "output was not closed after the exit"
                );
            }
            (ended, oom)
        }));
    }

    async fn kill(&mut self, signal: u32, all: bool) -> Result<()> {
        let phase = self.state.borrow().phase;
        let config = self.config.clone();
        let session = self.guest.session.clone();
        match phase {
            Phase::Stopped => Err(ShimError::NotFound {
                kind: "running process",
                id: config.id().to_owned(),
            }),
            Phase::Created if !config.exec.is_empty() => {
                self.ended(killed(), false);
                Ok(())
            }
            Phase::Created | Phase::Running | Phase::Paused if config.exec.is_empty() => {
                self.call(session.container().kill(&config.container, signal, all))
                    .await?;
                if self.end.is_none() {
                    // Killed before its start, which would have begun the wait.
                    let guest = self.guest.clone();
                    self.end = Some(Box::pin(
                        async move { wait_for_exit(&guest, &config).await },
                    ));
                }
                Ok(())
            }
            Phase::Created | Phase::Running | Phase::Paused => {
                self.call(
                    session
                        .execution()
                        .kill(&config.container, &config.exec, signal, all),
                )
                .await
            }
        }
    }

    async fn pause(&mut self, pause: bool) -> Result<()> {
        let (from, to, action) = match pause {
            true => (Phase::Running, Phase::Paused, "pause it"),
            false => (Phase::Paused, Phase::Running, "resume it"),
        };
        if self.state.borrow().phase != from {
            return Err(self.wrong_state(action));
        }
        let id = self.config.container.clone();
        let containers = self.guest.session.container();
        if pause {
            self.call(containers.pause(&id)).await?;
            self.context.publisher.publish(&TaskPaused {
                container_id: id,
                ..Default::default()
            });
        } else {
            self.call(containers.resume(&id)).await?;
            self.context.publisher.publish(&TaskResumed {
                container_id: id,
                ..Default::default()
            });
        }
        self.state.send_modify(|state| state.phase = to);
        Ok(())
    }

    async fn resize(&mut self, rows: u32, cols: u32) -> Result<()> {
        let config = self.config.clone();
        let execution = self.guest.session.execution();
        self.call(execution.resize_tty(&config.container, &config.exec, rows, cols))
            .await
    }

    fn reopen(&mut self, reply: Reply<()>) {
        match &self.pump {
            Some(pump) => pump.reopen(reply),
            None => drop(reply.send(match &mut self.sink {
                // Not started yet: the file is empty and can be opened again.
                Some(sink) => sink.reopen_unused(),
                None => Err(ShimError::Invalid {
                    field: "container_id",
                    reason: format!("container {} has no log file", self.config.container),
                }),
            })),
        }
    }

    async fn delete(&mut self) -> Result<State> {
        let state = self.state.borrow().clone();
        if matches!(state.phase, Phase::Running | Phase::Paused) {
            return Err(self.wrong_state("delete it"));
        }
        let config = self.config.clone();
        let session = self.guest.session.clone();
        let forgotten = match (config.exec.is_empty(), state.phase) {
            (true, _) => {
                self.call(session.container().delete(&config.container, true))
                    .await
            }
            // An exec that was not started does not exist in the guest.
            (false, Phase::Created) => Ok(()),
            (false, _) => {
                self.call(session.execution().delete(&config.container, &config.exec))
                    .await
            }
        };
        match forgotten {
            Ok(()) | Err(ShimError::VmGone { .. }) => {}
            Err(ShimError::Guest(error)) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        if state.ended.is_none() {
            self.state.send_modify(|state| {
                state.phase = Phase::Stopped;
                state.ended = Some(Ended {
                    status: UNKNOWN_EXIT_STATUS,
                    at_unix_ns: time::unix_ns(),
                });
            });
        }
        let state = self.state.borrow().clone();
        if config.exec.is_empty() {
            let ended = state.ended.unwrap_or(killed());
            self.context.publisher.publish(&TaskDelete {
                container_id: config.container.clone(),
                pid: state.pid,
                exit_status: ended.status,
                exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
                id: config.container.clone(),
                ..Default::default()
            });
        }
        Ok(state)
    }

    fn ended(&mut self, ended: Ended, oom: bool) {
        let pid = self.state.borrow().pid;
        // An OOM kill is reported by the event stream and by the exit. TaskOOM precedes TaskExit in both cases.
        if oom && self.oom.published.is_none() {
            self.oom();
        }
        // Published before the state changes, so that a waiter on the state finds the event queued.
        self.context.publisher.publish(&TaskExit {
            container_id: self.config.container.clone(),
            id: self.config.id().to_owned(),
            pid,
            exit_status: ended.status,
            exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
            ..Default::default()
        });
        self.state.send_modify(|state| {
            state.phase = Phase::Stopped;
            state.ended = Some(ended);
        });
        self.input = None;
    }

    fn oom(&mut self) {
        if !self.config.exec.is_empty() || self.state.borrow().phase == Phase::Stopped {
            return;
        }
        if !self.oom.allows(Instant::now()) {
            return;
        }
        self.context.publisher.publish(&TaskOOM {
            container_id: self.config.container.clone(),
            ..Default::default()
        });
    }

    async fn close(&mut self) {
        self.input = None;
        if let Some(pump) = self.pump.take() {
            pump.close().await;
        }
    }

    fn wrong_state(&self, action: &'static str) -> ShimError {
        ShimError::WrongState {
            kind: "process",
            id: self.config.id().to_owned(),
            state: format!("{:?}", self.state.borrow().phase).to_lowercase(),
            action,
        }
    }

    /// Calls the guest without borrowing the task, whose fields are not Sync.
    fn call<T, F>(&self, call: F) -> impl Future<Output = Result<T>> + use<T, F>
    where
        F: Future<Output = std::result::Result<T, PortalError>>,
    {
        let guest = self.guest.clone();
        async move { guest.call(call).await }
    }
}

fn killed() -> Ended {
    Ended {
        status: KILLED_EXIT_STATUS,
        at_unix_ns: time::unix_ns(),
    }
}

/// Waits for the guest's exit report, across reconnects, or for the end of the VM.
async fn wait_for_exit(guest: &Guest, config: &ProcessConfig) -> (Ended, bool) {
    let reported = async {
        loop {
            match guest
                .session
                .execution()
                .wait(&config.container, &config.exec)
                .await
            {
                Ok(exit) => return exit_info(&exit),
                Err(error) if error.is_transport() => tokio::time::sleep(WAIT_RETRY_DELAY).await,
                Err(error) => {
                    tracing::error!(container = config.container, exec = config.exec, error = %Report(&error), "failed to wait for the exit; exit status unknown");
                    let unknown = Ended {
                        status: UNKNOWN_EXIT_STATUS,
                        at_unix_ns: time::unix_ns(),
                    };
                    return (unknown, false);
                }
            }
        }
    };
    tokio::select! {
        exit = reported => exit,
        () = guest.ended.cancelled() => (killed(), false),
    }
}

fn exit_info(exit: &Exit) -> (Ended, bool) {
    let ended = Ended {
        status: exit.code.min(255),
        at_unix_ns: exit.finished_at_unix_ns,
    };
    (ended, exit.oom_killed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oom_limit_allows_one_event_per_interval() {
        let (mut limit, start) = (OomLimit::default(), Instant::now());
        let step = MIN_OOM_INTERVAL / 100;
        let allowed = (0..=200).filter(|n| limit.allows(start + step * *n));
        assert_eq!(allowed.collect::<Vec<_>>(), [0, 100, 200]);
    }
}
