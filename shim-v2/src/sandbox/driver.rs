//! [`Driver`]: the task that owns the sandbox's state (see the diagram in [`super`]).
//!
//! It handles requests and the end of the VM one at a time. During a start it accepts further starts, which join, and
//! stops, which cancel the start. Containers have their own tasks; the driver only signals them when the VM has ended.

use super::machine::{Booted, Machine, WarmVm};
use super::options::Plan;
use super::{Ended, Phase, Snapshot};
use crate::container::Containers;
use crate::error::{Result, ShimError};
use crate::mount_export::MountExporter;
use crate::pod::undo::Undo;
use crate::pod::{Context, Guest};
use crate::time;
use boxlite_sys::report::Report;
use boxlite_telemetry::{TraceContext, WithTrace};
use futures::future::BoxFuture;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Timeout for killed containers to exit and drain their output before the VM is shut down.
const CONTAINER_STOP_TIMEOUT: Duration = Duration::from_secs(4);
/// Timeout for the guest to answer a ping while its containers are killed. One that does not is ended without a shutdown, so that
/// stopping it takes less than 10 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for the guest to answer Guest.Shutdown, in addition to its grace period.
const SHUTDOWN_CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// Timeout for container exits to be recorded after the end of the VM.
const CONTAINER_EXIT_TIMEOUT: Duration = Duration::from_secs(12);
/// Timeout for the guest to sync and power off after its grace period.
const POWEROFF_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout for reaping a killed VMM, which takes the kernel a while for a VM with much memory.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);
/// Exit status of a VM that ended without a request: 128 + SIGKILL.
const DIED_EXIT_STATUS: u32 = 137;

/// Reply channel of a request.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// Requests to the driver.
pub enum Request {
    /// Sets the plan of the pod.
    Create(Box<Plan>, Reply<()>),
    /// Boots the VM, or joins a boot in progress. The boot belongs to the trace of the first caller.
    Start(Reply<Snapshot>, TraceContext),
    /// Stops the VM; the duration is the guest's grace period.
    Stop(Duration, Reply<()>),
    /// Stops the VM and ends the driver.
    Shutdown(Reply<()>),
}

/// A running VM.
struct Vm {
    exit: BoxFuture<'static, String>,
    kill: Arc<dyn Fn() + Send + Sync>,
    guest: Guest,
    undo: Undo,
}

/// A VM without a pod.
struct Waiting {
    exit: BoxFuture<'static, String>,
    undo: Undo,
}

/// A finished boot.
enum Started {
    Pod(Box<Booted>),
    Warm(WarmVm),
}

/// Outcome of a boot.
enum Outcome {
    Finished(Result<Started>),
    Stopped,
    ShutDown(Reply<()>),
}

/// Owner of the sandbox's state and VM.
pub struct Driver {
    context: Context,
    machine: Arc<dyn Machine>,
    requests: mpsc::Receiver<Request>,
    state: watch::Sender<Snapshot>,
    guest: watch::Sender<Option<Guest>>,
    containers: Arc<Containers>,
    vm: Option<Vm>,
    /// Set from the boot of a warm VM until a start gives it to the pod.
    warm: Option<Waiting>,
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
            warm: None,
        }
    }

    /// Handles requests until Shutdown, or until every handle is dropped.
    pub async fn run(mut self) {
        loop {
            let request = match (&mut self.vm, &mut self.warm) {
                (Some(vm), _) => tokio::select! {
                    request = self.requests.recv() => request,
                    reason = &mut vm.exit => {
                        tracing::warn!(sandbox = %self.context.id, reason, "VM ended unexpectedly");
                        self.vm_ended(DIED_EXIT_STATUS, reason).await;
                        continue;
                    }
                },
                (None, Some(warm)) => tokio::select! {
                    request = self.requests.recv() => request,
                    reason = &mut warm.exit => {
                        self.warm_ended(reason).await;
                        continue;
                    }
                },
                (None, None) => self.requests.recv().await,
            };
            match request {
                Some(Request::Create(plan, reply)) => drop(reply.send(self.create(*plan))),
                Some(Request::Start(reply, trace)) => {
                    if let Some(reply) = self.start(reply, trace).await {
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

    /// Applies a state change, publishes and logs it.
    fn publish(&self, change: impl FnOnce(&mut Snapshot)) {
        self.state.send_modify(|snapshot| {
            change(snapshot);
            snapshot.generation += 1;
            tracing::info!(
                sandbox = %self.context.id,
                generation = snapshot.generation,
                phase = ?snapshot.phase,
                pid = snapshot.pid,
                "sandbox state changed"
            );
        });
    }

    fn wrong_state(&self, action: &'static str) -> ShimError {
        ShimError::WrongState {
            kind: "sandbox",
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
            Some(known) if phase != Phase::Warm || !plan.fits(&known) => {
                Err(ShimError::AlreadyExists {
                    kind: "sandbox",
                    id: self.context.id.to_string(),
                })
            }
            // Without a plan, or with a warm VM, which becomes this pod's.
            _ => {
                if let Some(pod) = &plan.options.pod {
                    // A second plan is that of the same pod, after a failed start.
                    let _ = self.context.pod.set(pod.clone());
                }
                self.machine
                    .prepare(&self.context.id, &self.context.bundle, &plan);
                let writers = plan.options.volume_writers.clone();
                self.containers.writers().configure(writers);
                self.publish(|snapshot| {
                    snapshot.phase = Phase::Created;
                    snapshot.created_at_unix_ns = time::unix_ns();
                    snapshot.plan = Some(Arc::new(plan));
                });
                Ok(())
            }
        }
    }

    /// Boots the VM. Returns the reply channel of a Shutdown that arrived during the boot.
    async fn start(&mut self, reply: Reply<Snapshot>, trace: TraceContext) -> Option<Reply<()>> {
        let (phase, plan) = {
            let snapshot = self.state.borrow();
            (snapshot.phase, snapshot.plan.clone())
        };
        let plan = match (phase, plan) {
            (Phase::Ready | Phase::Warm, _) => {
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
        let started = Instant::now();
        let mut waiting = vec![reply];
        let mut stops = Vec::new();
        let mut undo = self
            .warm
            .take()
            .map_or_else(Undo::default, |warm| warm.undo);
        let booting = self.boot(&plan, &mut undo, &mut waiting, &mut stops);
        let outcome = booting.in_trace(trace).await;
        let (result, shutdown) = match outcome {
            Outcome::Finished(result) => (result, None),
            Outcome::Stopped => (
                Err(self.wrong_state("complete the start, which a stop cancelled")),
                None,
            ),
            Outcome::ShutDown(reply) => (Err(ShimError::Ending), Some(reply)),
        };
        match result {
            Ok(Started::Pod(booted)) => self.ready(*booted, undo, started),
            Ok(Started::Warm(vm)) => self.warm(vm, undo),
            Err(error) => {
                tracing::warn!(sandbox = %self.context.id, error = %Report(&error), "failed to start sandbox");
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
        let boot = async {
            let (id, bundle) = (&context.id, &context.bundle);
            match plan.options.warm {
                true => machine
                    .boot_warm(id, bundle, plan, undo)
                    .await
                    .map(Started::Warm),
                false => machine
                    .boot(id, bundle, plan, undo)
                    .await
                    .map(|booted| Started::Pod(Box::new(booted))),
            }
        };
        tokio::pin!(boot);
        loop {
            let request = tokio::select! {
                result = &mut boot => return Outcome::Finished(result),
                request = self.requests.recv() => request,
            };
            match request {
                Some(Request::Start(reply, _)) => waiting.push(reply),
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

    fn warm(&mut self, vm: WarmVm, undo: Undo) {
        self.warm = Some(Waiting {
            exit: vm.exit,
            undo,
        });
        self.publish(|snapshot| {
            snapshot.phase = Phase::Warm;
            snapshot.pid = vm.pid;
            snapshot.info = Arc::new(vm.info);
        });
    }

    /// Handles the end of a VM that no start has given to its pod yet. If its pod is known, the start boots another one.
    async fn warm_ended(&mut self, reason: String) {
        tracing::warn!(sandbox = %self.context.id, reason, "warm VM ended unexpectedly");
        if let Some(warm) = self.warm.take() {
            warm.undo.run().await;
        }
        if self.state.borrow().phase == Phase::Warm {
            self.vm_ended(DIED_EXIT_STATUS, reason).await;
        }
    }

    fn ready(&mut self, booted: Booted, mut undo: Undo, started: Instant) {
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
        if let Some(watch) = booted.work_dir {
            self.context.tasks.spawn(watch.run(guest.ended.clone()));
        }
        if let Some(watch) = booted.mirror {
            let volumes = Arc::clone(self.containers.mirrored());
            let task = watch.run(volumes, guest.ended.clone());
            self.context.tasks.spawn(task);
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
            if plan.owner.reports_host_pid() {
                self.context.host_pid.store(booted.pid, Ordering::Relaxed);
            }
        }
        let mut info = booted.info;
        info.push((
            "start_ms".to_owned(),
            started.elapsed().as_millis().to_string(),
        ));
        self.publish(|snapshot| {
            snapshot.phase = Phase::Ready;
            snapshot.pid = booted.pid;
            snapshot.info = Arc::new(info);
        });
    }

    /// Stops the VM in order: containers with their output, the guest with its disks, the VMM.
    async fn stop(&mut self, grace: Duration) {
        let Some(vm) = &mut self.vm else {
            if let Some(warm) = self.warm.take() {
                warm.undo.run().await;
            }
            if !matches!(self.state.borrow().phase, Phase::Stopped | Phase::None) {
                self.vm_ended(0, "stopped before it was started".to_owned())
                    .await;
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
            // Each step has a timeout, since a hostile or hung guest answers none of the calls.
            let stopped = async {
                containers.kill_all().await;
                containers.wait_stopped(CONTAINER_STOP_TIMEOUT).await
            };
            let guest = session.guest();
            let (stopped, answer) = tokio::join!(
                timeout(CONTAINER_STOP_TIMEOUT, stopped),
                timeout(ANSWER_TIMEOUT, guest.ping(2 * ANSWER_TIMEOUT))
            );
            if answer.is_err() {
                tracing::warn!("the guest does not answer; ending the VM");
                return;
            }
            if !matches!(stopped, Ok(true)) {
                tracing::warn!("containers survived SIGKILL; shutting down the VM");
            }
            match timeout(grace + SHUTDOWN_CALL_TIMEOUT, guest.shutdown(grace)).await {
                // Everything is written. The VMM is killed: the guest's own end would only take longer.
                Ok(Ok(())) => return,
                Ok(Err(error)) => {
                    tracing::warn!(error = %Report(&error), "failed to shut down the guest");
                }
                Err(_) => tracing::warn!("timed out shutting down the guest"),
            }
            tokio::time::sleep(POWEROFF_TIMEOUT).await;
        };
        let exited = tokio::select! {
            _ = &mut vm.exit => true,
            () = orderly => false,
        };
        if !exited {
            (vm.kill)();
            if timeout(KILL_TIMEOUT, &mut vm.exit).await.is_err() {
                tracing::error!("VMM survived SIGKILL");
            }
        }
        self.vm_ended(0, "stopped".to_owned()).await;
    }

    /// Handles the end of the VM: publishes it, waits for the containers, runs the undo steps.
    async fn vm_ended(&mut self, status: u32, reason: String) {
        let vm = self.vm.take();
        self.guest.send_replace(None);
        let at_unix_ns = time::unix_ns();
        self.publish(|snapshot| {
            snapshot.phase = Phase::Stopped;
            snapshot.pid = 0;
            snapshot.ended = Some(Ended {
                status,
                at_unix_ns,
                reason,
            });
        });
        if let Some(vm) = vm {
            vm.guest.ended.cancel();
            if !self.containers.wait_stopped(CONTAINER_EXIT_TIMEOUT).await {
                tracing::error!("timed out waiting for container exits");
            }
            // Its volumes are free for another pod, although the containers still exist.
            self.containers.writers().clear();
            vm.undo.run().await;
        }
    }

    async fn shutdown(&mut self, reply: Option<Reply<()>>) {
        self.stop(Duration::ZERO).await;
        self.containers.close_all().await;
        // Before the channel is closed, from which on no answer is awaited.
        if let Some(reply) = reply {
            drop(reply.send(Ok(())));
        }
        self.requests.close();
    }
}
