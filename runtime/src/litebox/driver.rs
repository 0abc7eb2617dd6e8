//! The driver: the task that owns a box's state. It persists each change first and then publishes it on a `watch`.
//!
//! The driver waits for the next [`Event`], handles it, and then [`Driver::advance`] starts the job that the phase
//! requires. At most one job runs at a time, as a task that reports its result here. The policy is in
//! `box_state`, the jobs are `pipeline` and `teardown`, and [`super::driver::watchers`] observe the shim.
//!
//! Invariants: a phase is persisted before its job starts, if it can be (stopping
//! does not depend on it); a message is answered
//! after its change was persisted; a container's row is deleted with its box's row. The task returns when its box is
//! removed, or when the runtime closes, which leaves the box running.

mod containers;
mod emit;
pub(crate) mod exit;
mod watchers;

use super::pipeline::{self, GuestReady, ShimRecorder, Start};
use super::teardown::{self, Exits};
use super::{BoxEnv, BoxView, Inner, LiteBox, Running};
use crate::box_state::{self, BoxPolicy, Denied, Phase, Request, Verdict};
use crate::database::{BoxRow, ContainerRow};
use crate::error::{Result, RuntimeError};
use crate::metrics::BoxMetrics;
use crate::panics::panicked;
use crate::shim_controller::ShimState;
use crate::types::{BoxOptions, ContainerSnapshot};
use boxlite_sys::ask::ask;
use boxlite_sys::report::report;
use boxlite_telemetry::{TraceContext, WithTrace};
use emit::Emitted;
use futures::FutureExt;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};
use watchers::WatchEvent;

/// Capacity of a driver's message channel; further senders wait.
const CHANNEL_CAPACITY: usize = 64;

/// Reply to a request. All callers that joined one operation share its error.
pub(crate) type Reply = oneshot::Sender<std::result::Result<(), Arc<RuntimeError>>>;
/// A change to a container's row.
pub(crate) type Change = Box<dyn FnOnce(&mut ContainerRow) + Send>;
/// Computes the caller's new data of a box or container from the old data.
pub type UpdateMetadata = Box<dyn FnOnce(&[u8]) -> Vec<u8> + Send>;

/// Messages from handles and from the start pipeline.
pub(crate) enum Message {
    /// Starts, stops or removes the box. The job belongs to the trace of the caller that began it.
    Request {
        request: Request,
        reply: Reply,
        trace: TraceContext,
    },
    /// Registers a container if the policy admits it; replies with the row registered under that id.
    Admit {
        row: Box<ContainerRow>,
        reply: oneshot::Sender<Result<ContainerRow>>,
    },
    /// Changes a container; replies with its new state.
    Change {
        id: String,
        change: Change,
        /// True if the change is a fact, which holds even if it cannot be persisted.
        fact: bool,
        reply: oneshot::Sender<Result<ContainerSnapshot>>,
    },
    /// Changes the caller's data of the box.
    UpdateMetadata {
        update_metadata: UpdateMetadata,
        reply: oneshot::Sender<Result<()>>,
    },
    /// Removes a container's row.
    Forget {
        id: String,
        reply: oneshot::Sender<Result<()>>,
    },
    /// The pipeline has spawned a shim.
    Spawned {
        state: ShimState,
        reply: oneshot::Sender<Result<()>>,
    },
    /// The shim reported that the OOM killer killed a process of this container.
    Oom { id: String },
}

/// Result of the current job.
enum JobResult {
    Start(Result<GuestReady>),
    Stop(Result<Exits>),
    Remove(Result<()>),
    /// Cleanup after a VM that died.
    Cleanup(Result<()>),
}

/// Input of a driver.
enum Event {
    Message(Message),
    JobDone(JobResult),
    WatchEvent(WatchEvent),
    /// The runtime shuts down.
    Close,
}

/// Next step of the driver after an event.
#[derive(PartialEq, Eq)]
enum Outcome {
    Continue,
    End,
}

/// State of a box that is registered or recovered.
pub(crate) struct InitialState {
    pub row: BoxRow,
    pub containers: Vec<ContainerRow>,
    /// Connections to the shim and guest of a recovered box that still runs.
    pub running: Option<Running>,
    pub metrics: Arc<BoxMetrics>,
    /// True if an earlier process created the box.
    pub recovered: bool,
}

struct Driver {
    env: Arc<BoxEnv>,
    row: BoxRow,
    policy: BoxPolicy,
    containers: BTreeMap<String, ContainerRow>,
    running: Option<Running>,
    metrics: Arc<BoxMetrics>,
    view: watch::Sender<Arc<BoxView>>,
    messages: mpsc::Receiver<Message>,
    /// Sender for the pipeline's messages; weak, so that the driver does not keep its own channel open.
    self_sender: mpsc::WeakSender<Message>,
    /// Holds at most one task.
    job: JoinSet<JobResult>,
    /// Trace of the next job.
    trace: TraceContext,
    /// Cancels the current pipeline.
    cancel: CancellationToken,
    starters: Vec<Reply>,
    stoppers: Vec<Reply>,
    removers: Vec<Reply>,
    watchers: JoinSet<WatchEvent>,
    watched: HashMap<String, AbortHandle>,
    emitted: Emitted,
}

/// Starts the driver and returns the handle. The row has been persisted already.
pub(crate) fn launch(env: Arc<BoxEnv>, initial: InitialState) -> LiteBox {
    let (messages, receiver) = mpsc::channel(CHANNEL_CAPACITY);
    let vmm = vmm_of(&env, &initial.row);
    let containers: BTreeMap<String, ContainerRow> = initial
        .containers
        .into_iter()
        .map(|row| (row.snapshot.id.clone(), row))
        .collect();
    let first = BoxView {
        generation: 0,
        phase: initial.row.phase,
        reason: initial.row.reason.clone(),
        timers: initial.row.timers.clone(),
        running: initial.running.clone(),
        vmm,
        metadata: Arc::new(initial.row.options.metadata.clone()),
        containers: snapshots(&containers),
    };
    let (view, viewer) = watch::channel(Arc::new(first));
    let inner = Inner {
        options: initial.row.options.clone(),
        created_at_ns: initial.row.created_at_ns,
        env: env.clone(),
        messages: messages.clone(),
        view: viewer,
        metrics: initial.metrics.clone(),
        cpu_times: Default::default(),
        operations: Default::default(),
    };
    let mut driver = Driver {
        policy: BoxPolicy::at(initial.row.phase),
        row: initial.row,
        containers,
        running: initial.running,
        metrics: initial.metrics,
        view,
        messages: receiver,
        self_sender: messages.downgrade(),
        job: JoinSet::new(),
        trace: TraceContext::default(),
        cancel: CancellationToken::new(),
        starters: Vec::new(),
        stoppers: Vec::new(),
        removers: Vec::new(),
        watchers: JoinSet::new(),
        watched: HashMap::new(),
        emitted: Emitted::Nothing,
        env: env.clone(),
    };
    if initial.recovered {
        let view = driver.view.borrow().clone();
        driver.emit_recovered(&view);
    }
    let span = pod_span(&driver.row.options);
    env.tasks.spawn(driver.run().instrument(span));
    LiteBox {
        inner: Arc::new(inner),
    }
}

/// Returns the span of a box's log lines. Of the highest level, so that warnings have it at every level of the log.
fn pod_span(options: &BoxOptions) -> Span {
    match &options.pod {
        Some(pod) => {
            tracing::error_span!(parent: None, "pod", namespace = pod.namespace, pod = pod.name)
        }
        None => Span::none(),
    }
}

/// Returns the VMM of a box: its shim's if it has one, even if the runtime's default has changed since.
fn vmm_of(env: &BoxEnv, row: &BoxRow) -> boxlite_proto::vmm::VmmKind {
    let recorded = row.shim.as_ref().map(|shim| shim.vmm.clone());
    recorded
        .or_else(|| row.options.vmm.clone())
        .unwrap_or_else(|| env.vmm.clone())
}

fn snapshots(containers: &BTreeMap<String, ContainerRow>) -> BTreeMap<String, ContainerSnapshot> {
    containers
        .iter()
        .map(|(id, row)| (id.clone(), row.snapshot.clone()))
        .collect()
}

impl Driver {
    async fn run(mut self) {
        self.watch_running();
        self.advance();
        loop {
            let event = self.next().await;
            let handled = AssertUnwindSafe(self.handle(event)).catch_unwind().await;
            match handled {
                Ok(Outcome::End) => return,
                Ok(Outcome::Continue) => {}
                Err(_) => self.on_panic(),
            }
            self.advance();
        }
    }

    async fn handle(&mut self, event: Event) -> Outcome {
        match event {
            Event::Message(message) => self.on_message(message).await,
            Event::JobDone(end) => self.on_job_done(end).await,
            Event::WatchEvent(watched) => self.on_watched(watched).await,
            Event::Close => Outcome::End,
        }
    }

    /// Continues after a handler that panicked: the box can still be stopped and removed. Callers get an error instead of waiting
    /// forever, and a job whose result was lost counts as failed, so that it is not repeated without a request.
    fn on_panic(&mut self) {
        tracing::error!(id = self.row.options.id, "handler of a sandbox panicked");
        if self.job.is_empty() {
            let failed = [
                box_state::Event::StartFailed,
                box_state::Event::StopFailed,
                box_state::Event::RemoveFailed,
            ];
            for event in failed {
                self.policy.event(event);
            }
        }
        self.row.phase = self.policy.phase();
        if self.row.phase == Phase::NotReady {
            let reason = self.row.reason.clone();
            self.end_in_memory(&reason);
        }
        self.publish();
        self.watch_running();
        let error = Err(Arc::new(panicked()));
        answer(&mut self.starters, &error);
        answer(&mut self.stoppers, &error);
        answer(&mut self.removers, &error);
    }

    /// Waits for the next event. Cancel-safe.
    async fn next(&mut self) -> Event {
        loop {
            tokio::select! {
                biased;
                () = self.env.closing.cancelled() => return Event::Close,
                Some(end) = self.job.join_next() => return Event::JobDone(match end {
                    Ok(end) => end,
                    Err(error) => self.job_panicked(&error),
                }),
                Some(watched) = self.watchers.join_next() => match watched {
                    Ok(watched) => return Event::WatchEvent(watched),
                    // Aborted with its container, or panicked: the panic is logged, and the watcher is restarted by the
                    // next `watch_running`.
                    Err(_) => continue,
                },
                Some(message) = self.messages.recv() => return Event::Message(message),
            }
        }
    }

    /// Treats a job that panicked as failed.
    fn job_panicked(&self, error: &tokio::task::JoinError) -> JobResult {
        let lost = RuntimeError::Internal {
            detail: format!("job of pod sandbox {} failed: {error}", self.row.options.id),
        };
        match self.policy.phase() {
            Phase::Starting => JobResult::Start(Err(lost)),
            Phase::Stopping => JobResult::Stop(Err(lost)),
            Phase::Removing => JobResult::Remove(Err(lost)),
            Phase::Created | Phase::Ready | Phase::NotReady | Phase::Removed => {
                JobResult::Cleanup(Err(lost))
            }
        }
    }

    /// Starts the job that the phase requires, unless a job is running; its result leads back here.
    fn advance(&mut self) {
        if !self.job.is_empty() {
            return;
        }
        match self.policy.phase() {
            Phase::Starting => self.begin_start(),
            Phase::Stopping => {
                let (env, id, shim) = self.job_context();
                let containers = self.live_containers();
                self.spawn(async move {
                    JobResult::Stop(teardown::stop(&env, &id, shim.as_ref(), containers).await)
                });
            }
            Phase::Removing => {
                let (env, id, shim) = self.job_context();
                self.spawn(async move {
                    JobResult::Remove(teardown::remove(&env, &id, shim.as_ref()).await)
                });
            }
            Phase::NotReady if self.running.is_some() || self.row.shim.is_some() => {
                let (env, id, shim) = self.job_context();
                self.row.shim = None;
                self.running = None;
                self.spawn(async move {
                    JobResult::Cleanup(teardown::end_shim(&env, &id, shim.as_ref()).await)
                });
            }
            Phase::Created | Phase::Ready | Phase::NotReady | Phase::Removed => {}
        }
    }

    fn job_context(
        &self,
    ) -> (
        Arc<BoxEnv>,
        String,
        Option<crate::shim_controller::ShimController>,
    ) {
        let shim = self.running.as_ref().map(|running| running.shim.clone());
        (self.env.clone(), self.row.options.id.clone(), shim)
    }

    fn begin_start(&mut self) {
        self.cancel = CancellationToken::new();
        let start = Start {
            env: self.env.clone(),
            options: self.row.options.clone(),
            vmm: vmm_of(&self.env, &self.row),
            bytes: self.metrics.bytes_transferred.clone(),
            cancel: self.cancel.clone(),
            recorder: DriverRecorder {
                driver: self.self_sender.clone(),
            },
        };
        self.spawn(async move { JobResult::Start(pipeline::run(start).await) });
    }

    /// Starts a job, whose log lines have the pod's names.
    fn spawn(&mut self, job: impl Future<Output = JobResult> + Send + 'static) {
        let trace = std::mem::take(&mut self.trace);
        self.job.spawn(job.in_trace(trace).in_current_span());
    }

    async fn on_message(&mut self, message: Message) -> Outcome {
        match message {
            Message::Request {
                request,
                reply,
                trace,
            } => self.on_request(request, reply, trace).await,
            Message::Admit { row, reply } => {
                let answer = self.admit(*row).await;
                let _ = reply.send(answer);
            }
            Message::Change {
                id,
                change,
                fact,
                reply,
            } => {
                let answer = self.change(&id, change, fact).await;
                let _ = reply.send(answer);
            }
            Message::UpdateMetadata {
                update_metadata,
                reply,
            } => {
                let answer = self.update_metadata(update_metadata).await;
                let _ = reply.send(answer);
            }
            Message::Forget { id, reply } => {
                let answer = self.forget(&id).await;
                let _ = reply.send(answer);
            }
            Message::Spawned { state, reply } => {
                self.row.shim = Some(state);
                let answer = self.env.database.update_box(self.row.clone()).await;
                let _ = reply.send(answer);
            }
            Message::Oom { id } => self.note_oom(&id).await,
        }
        Outcome::Continue
    }

    async fn on_request(&mut self, request: Request, reply: Reply, trace: TraceContext) {
        let before = self.policy.clone();
        let verdict = match self.policy.request(request) {
            Ok(verdict) => verdict,
            Err(denied) => {
                let _ = reply.send(Err(Arc::new(self.denied(denied))));
                return;
            }
        };
        if verdict == Verdict::Done {
            let _ = reply.send(Ok(()));
            return;
        }
        if verdict == Verdict::Begin {
            self.trace = trace;
            if request != Request::Start {
                self.cancel.cancel();
            }
            let reason = if request == Request::Start {
                String::new()
            } else {
                self.row.reason.clone()
            };
            if request != Request::Start {
                // Stopping must not fail because its record cannot be written, as on a full disk.
                self.enter_or_warn(reason).await;
            } else if let Err(error) = self.enter(reason).await {
                self.policy = before;
                self.row.phase = self.policy.phase();
                let _ = reply.send(Err(Arc::new(error)));
                return;
            }
        }
        match request {
            Request::Start => self.starters.push(reply),
            Request::Stop => self.stoppers.push(reply),
            Request::Remove => self.removers.push(reply),
        }
    }

    fn denied(&self, denied: Denied) -> RuntimeError {
        RuntimeError::Denied {
            id: self.row.options.id.clone(),
            denied,
        }
    }

    async fn on_job_done(&mut self, result: JobResult) -> Outcome {
        match result {
            JobResult::Start(result) => self.on_started(result).await,
            JobResult::Stop(result) => self.on_stopped(result).await,
            JobResult::Remove(result) => return self.on_removed(result).await,
            JobResult::Cleanup(result) => {
                if let Err(error) = result {
                    tracing::warn!(
                        id = self.row.options.id,
                        error = report(&error),
                        "failed to clean up after a dead VM"
                    );
                }
                self.enter_or_warn(self.row.reason.clone()).await;
            }
        }
        Outcome::Continue
    }

    async fn on_started(&mut self, result: Result<GuestReady>) {
        match result {
            Ok(ready) => {
                self.row.timers = ready.timers;
                self.row.shim = Some(ready.running.shim.state().clone());
                self.running = Some(ready.running);
                if !self.policy.event(box_state::Event::Started) {
                    // Stop or Remove was requested meanwhile; its job stops the VM.
                    let late = Err(Arc::new(self.denied(Denied::Stopped)));
                    return answer(&mut self.starters, &late);
                }
                self.watch_running();
                self.enter_or_warn(String::new()).await;
                answer(&mut self.starters, &Ok(()));
            }
            Err(error) => {
                self.row.shim = None;
                let text = report(&error);
                let still_starting = self.policy.event(box_state::Event::StartFailed);
                let error = if still_starting {
                    error
                } else {
                    self.denied(Denied::Stopped)
                };
                self.enter_or_warn(text).await;
                answer(&mut self.starters, &Err(Arc::new(error)));
            }
        }
    }

    async fn on_stopped(&mut self, result: Result<Exits>) {
        match result {
            Ok(exits) => {
                self.running = None;
                self.row.shim = None;
                self.policy.event(box_state::Event::Stopped);
                self.end_containers(&exits, "the pod was stopped").await;
                self.enter_or_warn(String::new()).await;
                answer(&mut self.stoppers, &Ok(()));
            }
            Err(error) => {
                self.policy.event(box_state::Event::StopFailed);
                self.enter_or_warn(report(&error)).await;
                self.watch_running();
                answer(&mut self.stoppers, &Err(Arc::new(error)));
            }
        }
    }

    async fn on_removed(&mut self, result: Result<()>) -> Outcome {
        self.running = None;
        self.row.shim = None;
        let result = match result {
            Ok(()) => self.env.database.delete_box(&self.row.options.id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            self.policy.event(box_state::Event::RemoveFailed);
            self.end_containers(&Exits::new(), "the pod was being removed")
                .await;
            self.enter_or_warn(report(&error)).await;
            let error = Err(Arc::new(error));
            answer(&mut self.stoppers, &error);
            answer(&mut self.removers, &error);
            return Outcome::Continue;
        }
        for row in self.containers.values() {
            self.env.release_images(&row.snapshot);
        }
        self.containers.clear();
        self.policy.event(box_state::Event::RemoveDone);
        self.row.phase = self.policy.phase();
        self.publish();
        self.env
            .removed
            .removed(&self.row.options.id, &self.metrics.snapshot());
        let late = Err(Arc::new(self.denied(Denied::Removed)));
        answer(&mut self.starters, &late);
        answer(&mut self.stoppers, &Ok(()));
        answer(&mut self.removers, &Ok(()));
        Outcome::End
    }

    async fn on_watched(&mut self, watched: WatchEvent) -> Outcome {
        match watched {
            WatchEvent::Exited { id, exit, oom } => {
                self.watched.remove(&id);
                self.on_exit(&id, exit, oom).await;
            }
            WatchEvent::Unknown { id } => {
                self.watched.remove(&id);
            }
            WatchEvent::Reconnected { running } => {
                self.running = Some(*running);
                self.publish();
                self.stop_watching();
                self.watch_running();
            }
            WatchEvent::VmGone { reason, exits } => {
                if self.policy.event(box_state::Event::VmGone) {
                    self.stop_watching();
                    self.end_containers(&exits, &reason).await;
                    // The view drops the VM at once; `advance` hands the shim to the cleanup job.
                    self.enter_or_warn(reason).await;
                }
            }
        }
        Outcome::Continue
    }

    /// Changes the caller's data; persists before it publishes.
    async fn update_metadata(&mut self, update_metadata: UpdateMetadata) -> Result<()> {
        let mut row = self.row.clone();
        row.options.metadata = update_metadata(&row.options.metadata);
        self.env.database.update_box(row.clone()).await?;
        self.row = row;
        self.publish();
        Ok(())
    }

    /// Persists the policy's phase and publishes it.
    async fn enter(&mut self, reason: String) -> Result<()> {
        let mut row = self.row.clone();
        row.phase = self.policy.phase();
        row.reason = reason;
        self.env.database.update_box(row.clone()).await?;
        self.row = row;
        self.publish();
        Ok(())
    }

    /// As [`Self::enter`], for facts that hold even if they cannot be persisted; then only logs the failure.
    async fn enter_or_warn(&mut self, reason: String) {
        self.row.phase = self.policy.phase();
        self.row.reason = reason;
        if let Err(error) = self.env.database.update_box(self.row.clone()).await {
            tracing::error!(
                id = self.row.options.id,
                error = report(&error),
                "failed to persist sandbox state"
            );
        }
        self.publish();
    }

    fn publish(&mut self) {
        let before = self.view.borrow().clone();
        let alive = matches!(self.policy.phase(), Phase::Ready | Phase::Stopping);
        let next = BoxView {
            generation: before.generation + 1,
            phase: self.policy.phase(),
            reason: self.row.reason.clone(),
            timers: self.row.timers.clone(),
            running: self.running.clone().filter(|_| alive),
            vmm: vmm_of(&self.env, &self.row),
            metadata: match *before.metadata == self.row.options.metadata {
                true => before.metadata.clone(),
                false => Arc::new(self.row.options.metadata.clone()),
            },
            containers: snapshots(&self.containers),
        };
        if next.phase != before.phase {
            tracing::info!(
                id = self.row.options.id,
                generation = next.generation,
                from = ?before.phase,
                to = ?next.phase,
                reason = next.reason,
                "sandbox state changed"
            );
        }
        let next = Arc::new(next);
        self.view.send_replace(next.clone());
        if let (Some(ended), None) = (&before.running, &next.running) {
            // After the publication, so that callers whose calls fail find the reason in the view.
            ended.session.sever();
        }
        self.emit_changes(&before, &next);
    }
}

/// Persists the shim's state on behalf of the pipeline.
struct DriverRecorder {
    driver: mpsc::WeakSender<Message>,
}

impl ShimRecorder for DriverRecorder {
    async fn record(&self, state: ShimState) -> Result<()> {
        let answer = match self.driver.upgrade() {
            Some(driver) => ask(&driver, |reply| Message::Spawned { state, reply }).await,
            None => None,
        };
        answer.unwrap_or(Err(RuntimeError::ShuttingDown))
    }
}

fn answer(waiting: &mut Vec<Reply>, result: &std::result::Result<(), Arc<RuntimeError>>) {
    for reply in waiting.drain(..) {
        let _ = reply.send(result.clone());
    }
}
