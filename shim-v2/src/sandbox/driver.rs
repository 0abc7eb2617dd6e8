//! [`Driver`]: the one task that writes the sandbox's state (see the diagram in [`super`]).
//!
//! It selects between requests and the end of the VM, and acts on one at a time; during a start it still hears further
//! starts (they join) and stops (they end it). Containers have tasks of their own; this only tells them when the VM is gone.

use super::machine::{Booted, Machine};
use super::options::Plan;
use super::{Ended, Phase, Snapshot};
use crate::container::Containers;
use crate::error::{Result, ShimError};
use crate::mount_export::MountExporter;
use crate::pod::undo::Undo;
use crate::pod::{Context, Guest};
use crate::time;
use boxlite_sys::report::Report;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// How long killed containers may take to end before the VM is ended over their heads: their last output is drained.
const CONTAINERS_LIMIT: Duration = Duration::from_secs(12);
/// How long the guest may take to sync and power off after its grace.
const POWEROFF_LIMIT: Duration = Duration::from_secs(5);
/// How long a killed VMM may take to be reaped; with much memory the kernel needs a while.
const KILL_LIMIT: Duration = Duration::from_secs(30);
/// Exit status of a VM that ended by itself: as if killed.
const DIED: u32 = 137;

/// Answer to a request.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// What the driver can be asked.
pub enum Request {
    /// Describe the pod.
    Create(Box<Plan>, Reply<()>),
    /// Boot, or join a boot.
    Start(Reply<Snapshot>),
    /// End the VM; the duration is the guest's grace.
    Stop(Duration, Reply<()>),
    /// End the VM and the driver.
    Shutdown(Reply<()>),
}

/// A VM that runs.
struct Vm {
    exit: BoxFuture<'static, String>,
    kill: Arc<dyn Fn() + Send + Sync>,
    guest: Guest,
    undo: Undo,
}

/// What ended a boot.
enum Outcome {
    Finished(Box<Result<Booted>>),
    Stopped,
    ShutDown(Reply<()>),
}

/// See the module.
pub struct Driver {
    context: Context,
    machine: Arc<dyn Machine>,
    requests: mpsc::Receiver<Request>,
    state: watch::Sender<Snapshot>,
    guest: watch::Sender<Option<Guest>>,
    containers: Arc<Containers>,
    vm: Option<Vm>,
}

impl Driver {
    pub(super) fn new(
        context: Context,
        machine: Arc<dyn Machine>,
        requests: mpsc::Receiver<Request>,
        state: watch::Sender<Snapshot>,
        guest: watch::Sender<Option<Guest>>,
        containers: Arc<Containers>,
    ) -> Self {
        Self {
            context,
            machine,
            requests,
            state,
            guest,
            containers,
            vm: None,
        }
    }

    /// Drives until Shutdown, or until every handle is gone.
    pub async fn run(mut self) {
        loop {
            let request = match &mut self.vm {
                Some(vm) => tokio::select! {
                    request = self.requests.recv() => request,
                    how = &mut vm.exit => {
                        tracing::warn!(sandbox = %self.context.id, how, "the VM died");
                        self.ended(DIED, how).await;
                        continue;
                    }
                },
                None => self.requests.recv().await,
            };
            match request {
                Some(Request::Create(plan, reply)) => drop(reply.send(self.create(*plan))),
                Some(Request::Start(reply)) => {
                    if let Some(reply) = self.start(reply).await {
                        self.shutdown(Some(reply)).await;
                        return;
                    }
                }
                Some(Request::Stop(grace, reply)) => {
                    self.stop(grace).await;
                    drop(reply.send(Ok(())));
                }
                Some(Request::Shutdown(reply)) => return self.shutdown(Some(reply)).await,
                None => return self.shutdown(None).await,
            }
        }
    }

    /// The one place where state is published.
    fn publish(&self, change: impl FnOnce(&mut Snapshot)) {
        self.state.send_modify(|snapshot| {
            change(snapshot);
            snapshot.generation += 1;
            tracing::info!(
                sandbox = %self.context.id,
                generation = snapshot.generation,
                phase = ?snapshot.phase,
                pid = snapshot.pid,
                "sandbox state"
            );
        });
    }

    fn wrong_state(&self, action: &'static str) -> ShimError {
        ShimError::WrongState {
            what: "sandbox",
            id: self.context.id.to_string(),
            state: format!("{:?}", self.state.borrow().phase).to_lowercase(),
            action,
        }
    }

    fn create(&mut self, plan: Plan) -> Result<()> {
        let (phase, known) = {
            let snapshot = self.state.borrow();
            (snapshot.phase, snapshot.plan.clone())
        };
        if phase == Phase::Stopped {
            return Err(self.wrong_state("create it"));
        }
        match known {
            Some(known) if *known == plan => Ok(()),
            Some(_) => Err(ShimError::AlreadyExists {
                what: "sandbox",
                id: self.context.id.to_string(),
            }),
            None => {
                self.machine
                    .prepare(&self.context.id, &self.context.bundle, &plan);
                self.publish(|snapshot| {
                    snapshot.phase = Phase::Created;
                    snapshot.created_at_unix_ns = time::unix_ns();
                    snapshot.plan = Some(Arc::new(plan));
                });
                Ok(())
            }
        }
    }

    /// Boots. Some: a shutdown came meanwhile and wants its answer.
    async fn start(&mut self, reply: Reply<Snapshot>) -> Option<Reply<()>> {
        let (phase, plan) = {
            let snapshot = self.state.borrow();
            (snapshot.phase, snapshot.plan.clone())
        };
        let plan = match (phase, plan) {
            (Phase::Ready, _) => {
                drop(reply.send(Ok(self.state.borrow().clone())));
                return None;
            }
            (Phase::Created, Some(plan)) => plan,
            _ => {
                drop(reply.send(Err(self.wrong_state("start it"))));
                return None;
            }
        };
        self.publish(|snapshot| snapshot.phase = Phase::Starting);
        let began = Instant::now();
        let mut waiting = vec![reply];
        let mut stops = Vec::new();
        let mut undo = Undo::default();
        let outcome = self.boot(&plan, &mut undo, &mut waiting, &mut stops).await;
        let (result, shutdown) = match outcome {
            Outcome::Finished(result) => (*result, None),
            Outcome::Stopped => (
                Err(self.wrong_state("go on with its start: it was stopped")),
                None,
            ),
            Outcome::ShutDown(reply) => (Err(ShimError::Ending), Some(reply)),
        };
        match result {
            Ok(booted) => self.ready(booted, undo, began),
            Err(error) => {
                tracing::warn!(sandbox = %self.context.id, error = %Report(&error), "start failed");
                undo.run().await;
                self.publish(|snapshot| snapshot.phase = Phase::Created);
                for reply in waiting.drain(..) {
                    drop(reply.send(Err(error.clone())));
                }
            }
        }
        for reply in waiting {
            drop(reply.send(Ok(self.state.borrow().clone())));
        }
        if !stops.is_empty() {
            self.stop(Duration::ZERO).await;
        }
        for reply in stops {
            drop(reply.send(Ok(())));
        }
        shutdown
    }

    async fn boot(
        &mut self,
        plan: &Plan,
        undo: &mut Undo,
        waiting: &mut Vec<Reply<Snapshot>>,
        stops: &mut Vec<Reply<()>>,
    ) -> Outcome {
        let machine = self.machine.clone();
        let context = self.context.clone();
        let boot = machine.boot(&context.id, &context.bundle, plan, undo);
        tokio::pin!(boot);
        loop {
            let request = tokio::select! {
                result = &mut boot => return Outcome::Finished(Box::new(result)),
                request = self.requests.recv() => request,
            };
            match request {
                Some(Request::Start(reply)) => waiting.push(reply),
                Some(Request::Create(plan, reply)) => drop(reply.send(self.create(*plan))),
                Some(Request::Stop(_, reply)) => {
                    stops.push(reply);
                    return Outcome::Stopped;
                }
                Some(Request::Shutdown(reply)) => return Outcome::ShutDown(reply),
                None => return Outcome::Stopped,
            }
        }
    }

    fn ready(&mut self, booted: Booted, mut undo: Undo, began: Instant) {
        let guest = Guest {
            session: booted.session,
            share: booted.share,
            ended: CancellationToken::new(),
        };
        self.guest.send_replace(Some(guest.clone()));
        self.context
            .tasks
            .spawn(super::oom::follow(guest.clone(), self.containers.clone()));
        if let Some(ports) = booted.host_ports {
            self.context.tasks.spawn(ports.run(guest.ended.clone()));
        }
        if let Some(watch) = booted.file_server {
            self.context.tasks.spawn(watch.run(guest.ended.clone()));
        }
        if let Some(mounter) = booted.mounter {
            let volumes = self.containers.export_volumes().clone();
            let exporter = MountExporter::new(&guest.session, mounter, volumes);
            let task = self.context.tasks.spawn(exporter.run(guest.ended.clone()));
            // Stopping the VM completes only after its mounts are gone from the host.
            undo.push("exported mounts", move || task);
        }
        self.vm = Some(Vm {
            exit: booted.exit,
            kill: booted.kill,
            guest,
            undo,
        });
        if let Some(plan) = &self.state.borrow().plan {
            self.context
                .host_ipc
                .store(plan.host_ipc, Ordering::Relaxed);
            if plan.origin.shows_host_pid() {
                self.context.host_pid.store(booted.pid, Ordering::Relaxed);
            }
        }
        let mut info = booted.info;
        info.push((
            "start_ms".to_owned(),
            began.elapsed().as_millis().to_string(),
        ));
        self.publish(|snapshot| {
            snapshot.phase = Phase::Ready;
            snapshot.pid = booted.pid;
            snapshot.info = Arc::new(info);
        });
    }

    /// Ends the VM in order: containers with their output, the guest with its disks, the VMM.
    async fn stop(&mut self, grace: Duration) {
        let Some(vm) = &mut self.vm else {
            if !matches!(self.state.borrow().phase, Phase::Stopped | Phase::None) {
                self.ended(0, "stopped before it ran".to_owned()).await;
            }
            return;
        };
        self.state.send_modify(|snapshot| {
            snapshot.phase = Phase::Stopping;
            snapshot.generation += 1;
        });
        let containers = self.containers.clone();
        let session = vm.guest.session.clone();
        let orderly = async {
            containers.kill_all().await;
            if !containers.settled(CONTAINERS_LIMIT).await {
                tracing::warn!("containers outlived SIGKILL; the VM ends over their heads");
            }
            if let Err(error) = session.guest().shutdown(grace).await {
                tracing::warn!(error = %Report(&error), "the guest does not shut down");
            }
            tokio::time::sleep(POWEROFF_LIMIT).await;
        };
        let over = tokio::select! {
            _ = &mut vm.exit => true,
            () = orderly => false,
        };
        if !over {
            (vm.kill)();
            if tokio::time::timeout(KILL_LIMIT, &mut vm.exit)
                .await
                .is_err()
            {
                tracing::error!("the VMM outlived SIGKILL");
            }
        }
        self.ended(0, "stopped".to_owned()).await;
    }

    /// The VM is gone: says so, lets the containers end, takes everything back.
    async fn ended(&mut self, status: u32, how: String) {
        let vm = self.vm.take();
        self.guest.send_replace(None);
        let at_unix_ns = time::unix_ns();
        self.publish(|snapshot| {
            snapshot.phase = Phase::Stopped;
            snapshot.pid = 0;
            snapshot.ended = Some(Ended {
                status,
                at_unix_ns,
                how,
            });
        });
        if let Some(vm) = vm {
            vm.guest.ended.cancel();
            if !self.containers.settled(CONTAINERS_LIMIT).await {
                tracing::error!("a container's end is not recorded in time");
            }
            vm.undo.run().await;
        }
    }

    async fn shutdown(&mut self, reply: Option<Reply<()>>) {
        self.stop(Duration::ZERO).await;
        self.containers.close_all().await;
        self.requests.close();
        if let Some(reply) = reply {
            drop(reply.send(Ok(())));
        }
    }
}
