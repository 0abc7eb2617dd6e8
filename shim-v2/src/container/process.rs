//! [`Process`]: a handle to one process in the guest, the init of a container or an exec'd one, and the task that writes
//! its state.
//!
//! The task alone starts, signals and forgets the process and publishes its events, so their order is that of its
//! decisions. Output is [`crate::logs`]'; an end is told only after the output was drained to where it belongs.
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
use boxlite_portal::PortalError;
use boxlite_proto::boxlite::v1::{ExecRequest, Exit};
use boxlite_sys::report::Report;
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use futures::future::BoxFuture;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Requests that wait for the task.
const REQUEST_QUEUE: usize = 32;
/// Pause before the guest is asked again for an exit after its connection broke.
const WAIT_PAUSE: Duration = Duration::from_millis(200);
/// Output still awaited after the end of a process while nothing moves: a child may hold its pipe for ever.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(10);
/// Exit status of what died with its VM.
const KILLED: u32 = 137;
/// Exit status where nobody knows it; containerd's UnknownExitStatus.
const UNKNOWN: u32 = 255;

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Registered; nothing of it has run.
    Created,
    /// Runs.
    Running,
    /// Frozen with its container.
    Paused,
    /// Ended, its output where it belongs.
    Stopped,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// 0–255; 128 + signal for a death by signal.
    pub status: u32,
    /// Nanoseconds since the epoch; the guest's clock where it told the end.
    pub at_unix_ns: i64,
}

/// What the task publishes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Where it is.
    pub phase: Phase,
    /// Pid as it is shown: see [`Context::reported_pid`]; 0 before an exec started.
    pub pid: u32,
    /// Set in Stopped.
    pub ended: Option<Ended>,
}

/// What does not change.
#[derive(Debug, Clone)]
pub struct About {
    /// The container's id.
    pub container: String,
    /// Empty for the init process.
    pub exec: String,
    /// The container's bundle.
    pub bundle: PathBuf,
    /// Where input and output are, as asked.
    pub stdio: Stdio,
}

impl About {
    /// The id events and states carry: the exec's, or the container's for the init.
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
    Start(Reply<u32>),
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
    /// The kernel killed a process of the container for memory.
    Oom,
    Delete(Reply<State>),
    Close(oneshot::Sender<()>),
}

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Process {
    about: Arc<About>,
    requests: mpsc::Sender<Request>,
    state: watch::Receiver<State>,
}

impl Process {
    /// Starts the task of a process that is registered: a container made by Container.Init with `pid`, or an exec with
    /// its OCI process as JSON.
    pub fn spawn(
        context: &Context,
        guest: &Guest,
        about: About,
        sink: Sink,
        pid: u32,
        exec_json: Option<Vec<u8>>,
    ) -> Self {
        let about = Arc::new(about);
        let (requests, receiver) = mpsc::channel(REQUEST_QUEUE);
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
            about: about.clone(),
            requests: receiver,
            state: sender,
            sink: Some(sink),
            pump: None,
            input: None,
            exec_json,
            oom_told: false,
            close_input: false,
            end: None,
        };
        context.tasks.spawn(task.run());
        Self {
            about,
            requests,
            state,
        }
    }

    /// What does not change.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// The state as last published.
    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Lets it run; answers its pid in the guest. Running already: WrongState.
    ///
    /// # Errors
    /// WrongState, the guest's refusal.
    pub async fn start(&self) -> Result<u32> {
        self.ask(Request::Start).await
    }

    /// Sends a Linux signal, to the whole tree with `all`.
    ///
    /// # Errors
    /// NotFound once it has ended (what containerd expects), the guest's refusal.
    pub async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        self.ask(|reply| Request::Kill { signal, all, reply }).await
    }

    /// Freezes (true) or thaws the container.
    ///
    /// # Errors
    /// WrongState, the guest's refusal.
    pub async fn pause(&self, pause: bool) -> Result<()> {
        self.ask(|reply| Request::Pause(pause, reply)).await
    }

    /// New terminal size.
    ///
    /// # Errors
    /// The guest's refusal.
    pub async fn resize(&self, rows: u32, cols: u32) -> Result<()> {
        self.ask(|reply| Request::Resize { rows, cols, reply })
            .await
    }

    /// End of input.
    ///
    /// # Errors
    /// When the process is gone.
    pub async fn close_input(&self) -> Result<()> {
        self.ask(Request::CloseInput).await
    }

    /// See [`LogPump::reopen`].
    ///
    /// # Errors
    /// Invalid where it has no log file; Io where the new file cannot be opened (the old one is kept).
    pub async fn reopen_log(&self) -> Result<()> {
        self.ask(Request::ReopenLog).await
    }

    /// The guest says that the kernel killed a process of the container for want of memory; after its end it says so no
    /// more. Nobody waits for what comes of it.
    pub async fn oom(&self) {
        // An error means that the task has ended: nothing to tell any more.
        drop(self.requests.send(Request::Oom).await);
    }

    /// Forgets it in the guest. It must not run.
    ///
    /// # Errors
    /// WrongState while it runs, the guest's refusal.
    pub async fn delete(&self) -> Result<State> {
        self.ask(Request::Delete).await
    }

    /// Ends the task and its log writer. Ended already: nothing happens.
    pub async fn close(&self) {
        let (reply, answer) = oneshot::channel();
        if self.requests.send(Request::Close(reply)).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// Waits for its end. Many may wait; dropping the future changes nothing.
    ///
    /// # Errors
    /// NotFound when it was deleted before it ran.
    pub async fn wait(&self) -> Result<Ended> {
        let mut state = self.state.clone();
        let gone = || ShimError::NotFound {
            what: "process",
            id: self.about.id().to_owned(),
        };
        let state = state
            .wait_for(|state| state.ended.is_some())
            .await
            .map_err(|_| gone())?;
        state.ended.ok_or_else(gone)
    }

    /// Completes when it doesn't run: ended, or never started.
    pub async fn settled(&self) {
        let mut state = self.state.clone();
        // An error means that the task has ended: settled too.
        drop(
            state
                .wait_for(|state| matches!(state.phase, Phase::Created | Phase::Stopped))
                .await,
        );
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let gone = || ShimError::NotFound {
            what: "process",
            id: self.about.id().to_owned(),
        };
        self.requests
            .send(request(reply))
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

struct Task {
    context: Context,
    guest: Guest,
    about: Arc<About>,
    requests: mpsc::Receiver<Request>,
    state: watch::Sender<State>,
    /// Opened at Create, taken by Start.
    sink: Option<Sink>,
    pump: Option<LogPump>,
    input: Option<Input>,
    exec_json: Option<Vec<u8>>,
    /// An OOM kill was published.
    oom_told: bool,
    /// CloseIO came before Start.
    close_input: bool,
    /// Exit, then drained output.
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
                    // The VM is gone before this ever ran.
                    () = self.guest.ended.cancelled(), if self.state.borrow().ended.is_none() => {
                        self.ended(died(), false);
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
        // A caller that went away changes nothing: what was asked is done all the same.
        match request {
            Request::Start(reply) => {
                let started = self.start().await;
                if started.is_err() && matches!(self.sink, Some(Sink::Fifos { .. })) {
                    // Who failed to start it reads the FIFOs to their end before it goes on.
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
                    // Before the start: a client's input may have ended already.
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
        let about = self.about.clone();
        let pid = match &self.exec_json {
            None => {
                self.call(session.container().start(&about.container))
                    .await?
            }
            Some(json) => {
                let request = ExecRequest {
                    container_id: about.container.clone(),
                    exec_id: about.exec.clone(),
                    process_json: json.clone().into(),
                    terminal: about.stdio.terminal,
                    stdin: about.stdio.has_input(),
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
        if about.exec.is_empty() {
            self.context.publisher.publish(&TaskStart {
                container_id: about.container.clone(),
                pid,
                ..Default::default()
            });
        } else {
            self.context.publisher.publish(&TaskExecStarted {
                container_id: about.container.clone(),
                exec_id: about.exec.clone(),
                pid,
                ..Default::default()
            });
        }
        self.follow();
        Ok(pid)
    }

    /// From here on output, input and the exit are followed.
    fn follow(&mut self) {
        let about = &self.about;
        if let Some(sink) = self.sink.take() {
            self.pump = Some(LogPump::spawn(
                &self.context,
                &self.guest,
                &about.container,
                &about.exec,
                sink,
            ));
        }
        self.input = Input::spawn(
            &self.context,
            &self.guest,
            &about.container,
            &about.exec,
            &about.stdio.stdin,
        );
        if let Some(input) = self.input.as_ref().filter(|_| self.close_input) {
            input.close();
        }
        let drained = self.pump.as_ref().map(LogPump::watch_drained);
        let guest = self.guest.clone();
        let about = self.about.clone();
        self.end = Some(Box::pin(async move {
            let (ended, oom) = wait_for_exit(&guest, &about).await;
            if let Some(drained) = drained
                && !drained.within(DRAIN_LIMIT).await
            {
                tracing::warn!(
                    container = about.container,
                    exec = about.exec,
                    "output still open {} s after the exit",
                    DRAIN_LIMIT.as_secs()
                );
            }
            (ended, oom)
        }));
    }

    async fn kill(&mut self, signal: u32, all: bool) -> Result<()> {
        let phase = self.state.borrow().phase;
        let about = self.about.clone();
        let session = self.guest.session.clone();
        match phase {
            Phase::Stopped => Err(ShimError::NotFound {
                what: "running process",
                id: about.id().to_owned(),
            }),
            Phase::Created if !about.exec.is_empty() => {
                self.ended(died(), false);
                Ok(())
            }
            Phase::Created | Phase::Running | Phase::Paused if about.exec.is_empty() => {
                self.call(session.container().kill(&about.container, signal, all))
                    .await?;
                if self.end.is_none() {
                    // Created and killed before its start: somebody has to notice.
                    let guest = self.guest.clone();
                    self.end = Some(Box::pin(async move { wait_for_exit(&guest, &about).await }));
                }
                Ok(())
            }
            Phase::Created | Phase::Running | Phase::Paused => {
                self.call(
                    session
                        .execution()
                        .kill(&about.container, &about.exec, signal, all),
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
        let id = self.about.container.clone();
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
        let about = self.about.clone();
        let execution = self.guest.session.execution();
        self.call(execution.resize_tty(&about.container, &about.exec, rows, cols))
            .await
    }

    fn reopen(&mut self, reply: Reply<()>) {
        match &self.pump {
            Some(pump) => pump.reopen(reply),
            None => drop(reply.send(match &mut self.sink {
                // Not started yet: the file is there and empty; a rotated one is made anew by opening it at Start.
                Some(sink) => sink.reopen_unused(),
                None => Err(ShimError::Invalid {
                    field: "container_id",
                    reason: format!("{} has no log file", self.about.container),
                }),
            })),
        }
    }

    async fn delete(&mut self) -> Result<State> {
        let state = self.state.borrow().clone();
        if matches!(state.phase, Phase::Running | Phase::Paused) {
            return Err(self.wrong_state("delete it"));
        }
        let about = self.about.clone();
        let session = self.guest.session.clone();
        let forgotten = match (about.exec.is_empty(), state.phase) {
            (true, _) => {
                self.call(session.container().delete(&about.container, true))
                    .await
            }
            // The guest never heard of it.
            (false, Phase::Created) => Ok(()),
            (false, _) => {
                self.call(session.execution().delete(&about.container, &about.exec))
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
                    status: UNKNOWN,
                    at_unix_ns: time::unix_ns(),
                });
            });
        }
        let state = self.state.borrow().clone();
        if about.exec.is_empty() {
            let ended = state.ended.unwrap_or(died());
            self.context.publisher.publish(&TaskDelete {
                container_id: about.container.clone(),
                pid: state.pid,
                exit_status: ended.status,
                exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
                id: about.container.clone(),
                ..Default::default()
            });
        }
        Ok(state)
    }

    fn ended(&mut self, ended: Ended, oom: bool) {
        let pid = self.state.borrow().pid;
        // The event stream and the exit are two ways: whichever came first told it, and always before the exit.
        if oom && !self.oom_told {
            self.oom();
        }
        // Published before the state: who was woken by the state finds the event under way.
        self.context.publisher.publish(&TaskExit {
            container_id: self.about.container.clone(),
            id: self.about.id().to_owned(),
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
        if !self.about.exec.is_empty() || self.state.borrow().phase == Phase::Stopped {
            return;
        }
        self.oom_told = true;
        self.context.publisher.publish(&TaskOOM {
            container_id: self.about.container.clone(),
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
            what: "process",
            id: self.about.id().to_owned(),
            state: format!("{:?}", self.state.borrow().phase).to_lowercase(),
            action,
        }
    }

    /// Borrows nothing of the task: the future is sent between threads, and the task's parts cannot be shared.
    fn call<T, F>(&self, call: F) -> impl Future<Output = Result<T>> + use<T, F>
    where
        F: Future<Output = std::result::Result<T, PortalError>>,
    {
        let guest = self.guest.clone();
        async move { guest.call(call).await }
    }
}

fn died() -> Ended {
    Ended {
        status: KILLED,
        at_unix_ns: time::unix_ns(),
    }
}

/// Waits for the guest to tell the exit, over broken connections, or for the VM to end.
async fn wait_for_exit(guest: &Guest, about: &About) -> (Ended, bool) {
    let asked = async {
        loop {
            match guest
                .session
                .execution()
                .wait(&about.container, &about.exec)
                .await
            {
                Ok(exit) => return told(&exit),
                Err(error) if error.is_transport() => tokio::time::sleep(WAIT_PAUSE).await,
                Err(error) => {
                    tracing::error!(container = about.container, exec = about.exec, error = %Report(&error), "exit unknown");
                    let unknown = Ended {
                        status: UNKNOWN,
                        at_unix_ns: time::unix_ns(),
                    };
                    return (unknown, false);
                }
            }
        }
    };
    tokio::select! {
        exit = asked => exit,
        () = guest.ended.cancelled() => (died(), false),
    }
}

fn told(exit: &Exit) -> (Ended, bool) {
    let ended = Ended {
        status: exit.code.min(255),
        at_unix_ns: exit.finished_at_unix_ns,
    };
    (ended, exit.oom_killed)
}
