//! The driver: the one task that writes a box's state, on disk first, then on the `watch` that everybody reads.
//!
//! It selects into the closed enum [`Event`], handles it, and then [`Driver::advance`] starts whatever work the phase
//! calls for; one work at a time, each a task that reports its end here. Policy is `management::box_state`'s, the
//! works are `pipeline` and `teardown`; what happens *inside* the box is learnt by [`super::driver::watchers`].
//!
//! Invariants: a phase is on disk before work for it begins; a message is answered after what it changed is on disk;
//! a container's row goes when its box's row goes. The task ends when its box is removed or the runtime closes (and
//! then leaves the box running).

mod containers;
mod tell;
mod watchers;

/// How a container's row tells its end; recovery tells it the same way.
pub(crate) mod end {
    pub(crate) use super::containers::{finish, finish_unknown};
}

use super::pipeline::{self, GuestReady, ShimNote, Start};
use super::teardown::{self, Exits};
use super::{BoxEnv, BoxView, Inner, LiteBox, Running};
use crate::database::{BoxRow, ContainerRow};
use crate::error::{Result, RuntimeError};
use crate::management::box_state::{self, BoxPolicy, Denied, Phase, Request, Verdict};
use crate::metrics::BoxMetrics;
use crate::shim_controller::ShimRecord;
use crate::types::ContainerSnapshot;
use boxlite_sys::report::report;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tell::Told;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use watchers::Watched;

/// Messages waiting for a driver; a caller beyond that waits for room.
const QUEUE: usize = 64;

/// Answer to a request; failures are shared by all who joined it.
pub(crate) type Reply = oneshot::Sender<std::result::Result<(), Arc<RuntimeError>>>;
/// A change to a container's row.
pub(crate) type Change = Box<dyn FnOnce(&mut ContainerRow) + Send>;
/// The caller's own data of a box or container, made anew from what it was.
pub type Describe = Box<dyn FnOnce(&[u8]) -> Vec<u8> + Send>;

/// What handles (and the works' notes) send.
pub(crate) enum Message {
    /// A request about the whole box.
    Ask { request: Request, reply: Reply },
    /// Registers a container, if policy admits it; answers with what is registered under that id.
    Admit {
        row: Box<ContainerRow>,
        reply: oneshot::Sender<Result<ContainerRow>>,
    },
    /// Changes a container; answers what it is now.
    Change {
        id: String,
        change: Change,
        reply: oneshot::Sender<Result<ContainerSnapshot>>,
    },
    /// Changes the caller's own data of the box.
    Describe {
        describe: Describe,
        reply: oneshot::Sender<Result<()>>,
    },
    /// Forgets a container.
    Forget {
        id: String,
        reply: oneshot::Sender<Result<()>>,
    },
    /// The pipeline has a shim.
    Spawned {
        record: ShimRecord,
        reply: oneshot::Sender<Result<()>>,
    },
    /// A shim's event: the kernel killed a process of this container for want of memory.
    Oom { id: String },
}

/// How the work in hand ended.
enum WorkEnd {
    Start(Result<GuestReady>),
    Stop(Result<Exits>),
    Remove(Result<()>),
    /// Clearing up after a VM that died by itself.
    Aftermath(Result<()>),
}

/// Everything that can happen to a driver.
enum Event {
    Message(Message),
    Work(WorkEnd),
    Watched(Watched),
    /// The runtime closes.
    Close,
}

/// What to do after an event.
#[derive(PartialEq, Eq)]
enum Outcome {
    Continue,
    End,
}

/// A box as it is registered or found again.
pub(crate) struct Initial {
    pub row: BoxRow,
    pub containers: Vec<ContainerRow>,
    /// The shim and guest that live, of a box found again.
    pub running: Option<Running>,
    pub metrics: Arc<BoxMetrics>,
    /// Whether it is of an earlier runtime.
    pub found: bool,
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
    /// For the works' notes; weak, so that a box without handles could end.
    own: mpsc::WeakSender<Message>,
    /// At most one task.
    work: JoinSet<WorkEnd>,
    /// Cancels the pipeline in hand.
    cancel: CancellationToken,
    starters: Vec<Reply>,
    stoppers: Vec<Reply>,
    removers: Vec<Reply>,
    watchers: JoinSet<Watched>,
    watched: HashMap<String, AbortHandle>,
    told: Told,
}

/// Makes the handle and starts the driver. The row is on disk already.
pub(crate) fn launch(env: Arc<BoxEnv>, initial: Initial) -> LiteBox {
    let (messages, receiver) = mpsc::channel(QUEUE);
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
        own: messages.downgrade(),
        work: JoinSet::new(),
        cancel: CancellationToken::new(),
        starters: Vec::new(),
        stoppers: Vec::new(),
        removers: Vec::new(),
        watchers: JoinSet::new(),
        watched: HashMap::new(),
        told: Told::Nothing,
        env: env.clone(),
    };
    if initial.found {
        let view = driver.view.borrow().clone();
        driver.tell_found(&view);
    }
    env.tasks.spawn(driver.run());
    LiteBox {
        inner: Arc::new(inner),
    }
}

/// The VMM of a box: that of its shim, once it has one, whatever the runtime's default has become since.
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
        self.watch_what_runs();
        self.advance();
        loop {
            let event = self.next().await;
            let outcome = match event {
                Event::Message(message) => self.on_message(message).await,
                Event::Work(end) => self.on_work(end).await,
                Event::Watched(watched) => self.on_watched(watched).await,
                Event::Close => Outcome::End,
            };
            if outcome == Outcome::End {
                return;
            }
            self.advance();
        }
    }

    /// The next event. Cancel-safe: nothing is taken that is not returned.
    async fn next(&mut self) -> Event {
        loop {
            tokio::select! {
                biased;
                () = self.env.closing.cancelled() => return Event::Close,
                Some(end) = self.work.join_next() => return Event::Work(match end {
                    Ok(end) => end,
                    Err(error) => self.lost_work(&error),
                }),
                Some(watched) = self.watchers.join_next() => match watched {
                    Ok(watched) => return Event::Watched(watched),
                    // Aborted with its container, or panicked: the log has it, the next look at the shim makes it good.
                    Err(_) => continue,
                },
                Some(message) = self.messages.recv() => return Event::Message(message),
            }
        }
    }

    /// A work that panicked counts as failed.
    fn lost_work(&self, error: &tokio::task::JoinError) -> WorkEnd {
        let lost = RuntimeError::Internal {
            what: format!("a task of box {}: {error}", self.row.options.id),
        };
        match self.policy.phase() {
            Phase::Starting => WorkEnd::Start(Err(lost)),
            Phase::Stopping => WorkEnd::Stop(Err(lost)),
            Phase::Removing => WorkEnd::Remove(Err(lost)),
            Phase::Created | Phase::Ready | Phase::NotReady | Phase::Removed => {
                WorkEnd::Aftermath(Err(lost))
            }
        }
    }

    /// Starts the work that the phase calls for, unless one is in hand: then its end comes back here.
    fn advance(&mut self) {
        if !self.work.is_empty() {
            return;
        }
        match self.policy.phase() {
            Phase::Starting => self.begin_start(),
            Phase::Stopping => {
                let (env, id, shim) = self.for_work();
                let containers = self.live_containers();
                self.work.spawn(async move {
                    WorkEnd::Stop(teardown::stop(&env, &id, shim.as_ref(), containers).await)
                });
            }
            Phase::Removing => {
                let (env, id, shim) = self.for_work();
                self.work.spawn(async move {
                    WorkEnd::Remove(teardown::remove(&env, &id, shim.as_ref()).await)
                });
            }
            Phase::NotReady if self.running.is_some() || self.row.shim.is_some() => {
                let (env, id, shim) = self.for_work();
                self.row.shim = None;
                self.running = None;
                self.work.spawn(async move {
                    WorkEnd::Aftermath(teardown::end_shim(&env, &id, shim.as_ref()).await)
                });
            }
            Phase::Created | Phase::Ready | Phase::NotReady | Phase::Removed => {}
        }
    }

    fn for_work(
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
            note: Note {
                driver: self.own.clone(),
            },
        };
        self.work
            .spawn(async move { WorkEnd::Start(pipeline::run(start).await) });
    }

    async fn on_message(&mut self, message: Message) -> Outcome {
        match message {
            Message::Ask { request, reply } => self.on_request(request, reply).await,
            Message::Admit { row, reply } => {
                let answer = self.admit(*row).await;
                let _ = reply.send(answer);
            }
            Message::Change { id, change, reply } => {
                let answer = self.change(&id, change).await;
                let _ = reply.send(answer);
            }
            Message::Describe { describe, reply } => {
                let answer = self.describe(describe).await;
                let _ = reply.send(answer);
            }
            Message::Forget { id, reply } => {
                let answer = self.forget(&id).await;
                let _ = reply.send(answer);
            }
            Message::Spawned { record, reply } => {
                self.row.shim = Some(record);
                let answer = self.env.database.update_box(self.row.clone()).await;
                let _ = reply.send(answer);
            }
            Message::Oom { id } => self.note_oom(&id).await,
        }
        Outcome::Continue
    }

    async fn on_request(&mut self, request: Request, reply: Reply) {
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
            if request != Request::Start {
                self.cancel.cancel();
            }
            let reason = if request == Request::Start {
                String::new()
            } else {
                self.row.reason.clone()
            };
            if let Err(error) = self.enter(reason).await {
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

    async fn on_work(&mut self, end: WorkEnd) -> Outcome {
        match end {
            WorkEnd::Start(result) => self.on_started(result).await,
            WorkEnd::Stop(result) => self.on_stopped(result).await,
            WorkEnd::Remove(result) => return self.on_removed(result).await,
            WorkEnd::Aftermath(result) => {
                if let Err(error) = result {
                    tracing::warn!(
                        id = self.row.options.id,
                        error = report(&error),
                        "a dead box left something behind"
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
                self.row.shim = Some(ready.running.shim.record().clone());
                self.running = Some(ready.running);
                if !self.policy.event(box_state::Event::Started) {
                    // Stop or Remove came meanwhile; its work ends what was started.
                    let late = Err(Arc::new(self.denied(Denied::Stopped)));
                    return answer(&mut self.starters, &late);
                }
                self.watch_what_runs();
                self.enter_or_warn(String::new()).await;
                answer(&mut self.starters, &Ok(()));
            }
            Err(error) => {
                self.row.shim = None;
                let text = report(&error);
                let wanted = self.policy.event(box_state::Event::StartFailed);
                let error = if wanted {
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
                self.watch_what_runs();
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

    async fn on_watched(&mut self, watched: Watched) -> Outcome {
        match watched {
            Watched::Exited { id, exit, oom } => {
                self.watched.remove(&id);
                self.on_exit(&id, exit, oom).await;
            }
            Watched::Nothing { id } => {
                self.watched.remove(&id);
            }
            Watched::Reconnected { running } => {
                self.running = Some(*running);
                self.publish();
                self.stop_watching();
                self.watch_what_runs();
            }
            Watched::VmGone { reason, exits } => {
                if self.policy.event(box_state::Event::VmGone) {
                    self.stop_watching();
                    self.end_containers(&exits, &reason).await;
                    // Out of the view at once; `advance` takes the shim along for its clean-up.
                    self.enter_or_warn(reason).await;
                }
            }
        }
        Outcome::Continue
    }

    /// Changes the caller's own data, on disk first.
    async fn describe(&mut self, describe: Describe) -> Result<()> {
        let mut row = self.row.clone();
        row.options.metadata = describe(&row.options.metadata);
        self.env.database.update_box(row.clone()).await?;
        self.row = row;
        self.publish();
        Ok(())
    }

    /// Writes the policy's phase down and publishes it.
    async fn enter(&mut self, reason: String) -> Result<()> {
        let mut row = self.row.clone();
        row.phase = self.policy.phase();
        row.reason = reason;
        self.env.database.update_box(row.clone()).await?;
        self.row = row;
        self.publish();
        Ok(())
    }

    /// As [`Self::enter`], for what has happened already and is true whether it can be written down or not.
    async fn enter_or_warn(&mut self, reason: String) {
        self.row.phase = self.policy.phase();
        self.row.reason = reason;
        if let Err(error) = self.env.database.update_box(self.row.clone()).await {
            tracing::error!(
                id = self.row.options.id,
                error = report(&error),
                "state of a box is not on disk"
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
                "box"
            );
        }
        let next = Arc::new(next);
        self.view.send_replace(next.clone());
        self.tell_changes(&before, &next);
    }
}

/// The pipeline's way to have the shim's record written down.
struct Note {
    driver: mpsc::WeakSender<Message>,
}

impl ShimNote for Note {
    async fn note(&self, record: ShimRecord) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        let message = Message::Spawned { record, reply };
        let sent = match self.driver.upgrade() {
            Some(driver) => driver.send(message).await.is_ok(),
            None => false,
        };
        match sent {
            true => answer.await.unwrap_or(Err(RuntimeError::ShuttingDown)),
            false => Err(RuntimeError::ShuttingDown),
        }
    }
}

fn answer(waiting: &mut Vec<Reply>, result: &std::result::Result<(), Arc<RuntimeError>>) {
    for reply in waiting.drain(..) {
        let _ = reply.send(result.clone());
    }
}
