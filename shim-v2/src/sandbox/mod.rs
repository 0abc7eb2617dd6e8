//! [`Sandbox`]: the handle to this shim's pod VM and its containers that the services use.
//!
//! The [`driver`] task owns the state; others send requests and watch the published state. [`machine`] boots the VM.
//!
//! ```text
//!  (none) ──create──► Created ──start──► Starting ──guest ready──► Ready
//!                      ▲   ▲               │  │  failed or stopped   │ stop, VM died
//!               create │   └───────────────│──┘                      ▼
//!                      └───── Warm ◄───────┘    Stopping ──────► Stopped (final)
//!                              no pod yet
//! ```

pub mod driver;
pub mod machine;
pub mod oom;
pub mod options;

use crate::container::Containers;
use crate::error::{Result, ShimError};
use crate::pod::{Context, Guest};
use boxlite_sys::ask::ask;
use boxlite_telemetry::TraceContext;
use driver::Request;
use machine::Machine;
use options::Plan;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Capacity of the driver's request channel.
const REQUEST_CHANNEL_CAPACITY: usize = 64;

/// Lifecycle phase of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// CreateSandbox has not been called.
    None,
    /// Planned, not started.
    Created,
    /// The VM is being built or is booting.
    Starting,
    /// A VM without a pod has booted. CreateSandbox gives it one.
    Warm,
    /// The guest accepts containers.
    Ready,
    /// The VM is being stopped.
    Stopping,
    /// The VM has ended, by request or not. Final.
    Stopped,
}

impl Phase {
    /// Returns the state name for SandboxStatus; containerd knows SANDBOX_READY and SANDBOX_NOTREADY.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "SANDBOX_READY",
            Self::None
            | Self::Created
            | Self::Starting
            | Self::Warm
            | Self::Stopping
            | Self::Stopped => "SANDBOX_NOTREADY",
        }
    }
}

/// End of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit status for WaitSandbox: 0 after a stop, 137 if the VM died.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at_unix_ns: i64,
    /// Human-readable reason.
    pub reason: String,
}

/// State published by the driver. Each publication has a higher generation.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Number of publications.
    pub generation: u64,
    /// Lifecycle phase.
    pub phase: Phase,
    /// Pid of the VMM child on the host; 0 if the VM does not run.
    pub pid: u32,
    /// Time of CreateSandbox, nanoseconds since the epoch.
    pub created_at_unix_ns: i64,
    /// Set in phase Stopped.
    pub ended: Option<Ended>,
    /// Plan of the pod; set from phase Created on.
    pub plan: Option<Arc<Plan>>,
    /// Key-value pairs for SandboxStatus(verbose): kernel, agent, boot stage times.
    pub info: Arc<Vec<(String, String)>>,
}

impl Snapshot {
    fn new() -> Self {
        Self {
            generation: 0,
            phase: Phase::None,
            pid: 0,
            created_at_unix_ns: 0,
            ended: None,
            plan: None,
            info: Arc::default(),
        }
    }
}

/// Handle to the sandbox; clones share the driver.
#[derive(Clone)]
pub struct Sandbox {
    context: Context,
    requests: mpsc::Sender<Request>,
    state: watch::Receiver<Snapshot>,
    guest: watch::Receiver<Option<Guest>>,
    containers: Arc<Containers>,
}

impl Sandbox {
    /// Spawns the driver, which boots VMs with `machine` and ends after [`Sandbox::shutdown`].
    pub fn spawn(context: Context, machine: Arc<dyn Machine>) -> Self {
        let (requests, receiver) = mpsc::channel(REQUEST_CHANNEL_CAPACITY);
        let (state_sender, state) = watch::channel(Snapshot::new());
        let (guest_sender, guest) = watch::channel(None);
        let containers = Arc::new(Containers::new(context.clone()));
        let driver = driver::Driver::new(
            context.clone(),
            machine,
            receiver,
            state_sender,
            guest_sender,
            containers.clone(),
        );
        context.tasks.spawn(driver.run());
        Self {
            context,
            requests,
            state,
            guest,
            containers,
        }
    }

    /// Returns the shared context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Returns the containers of the pod.
    pub fn containers(&self) -> &Arc<Containers> {
        &self.containers
    }

    /// Returns the last published state.
    pub fn snapshot(&self) -> Snapshot {
        self.state.borrow().clone()
    }

    /// Returns the guest if it accepts containers. `action` is named in the error.
    ///
    /// # Errors
    /// WrongState before the guest is ready, VmGone after the VM has ended.
    pub fn guest(&self, action: &'static str) -> Result<Guest> {
        if let Some(guest) = self.guest.borrow().clone() {
            return Ok(guest);
        }
        let snapshot = self.snapshot();
        match snapshot.ended {
            Some(ended) => Err(ShimError::VmGone {
                reason: ended.reason,
            }),
            None => Err(ShimError::WrongState {
                kind: "sandbox",
                id: self.context.id.to_string(),
                state: format!("{:?}", snapshot.phase).to_lowercase(),
                action,
            }),
        }
    }

    /// Sets the plan of the pod. Succeeds if the same plan is set already.
    ///
    /// # Errors
    /// AlreadyExists for a different plan; WrongState after the end.
    pub async fn create(&self, plan: Plan) -> Result<()> {
        self.request(|reply| Request::Create(Box::new(plan), reply))
            .await
    }

    /// Boots the VM, or joins a boot in progress; returns at once if it is ready. Dropping the future does not cancel the
    /// boot.
    ///
    /// # Errors
    /// The failed step. The completed steps have been undone and another start may follow.
    pub async fn start(&self) -> Result<Snapshot> {
        let trace = TraceContext::current();
        self.request(|reply| Request::Start(reply, trace)).await
    }

    /// Stops the VM: containers first, then the guest with `grace` to shut down, then by force. Succeeds if the VM has ended.
    ///
    /// # Errors
    /// Ending while the shim is shutting down.
    pub async fn stop(&self, grace: Duration) -> Result<()> {
        self.request(|reply| Request::Stop(grace, reply)).await
    }

    /// Stops the VM and ends the driver.
    ///
    /// # Errors
    /// Ending if the shim is shutting down already.
    pub async fn shutdown(&self) -> Result<()> {
        self.request(Request::Shutdown).await
    }

    /// Waits for the end of the VM. Cancel safe.
    ///
    /// # Errors
    /// Ending if the driver ended first.
    pub async fn wait(&self) -> Result<Ended> {
        let mut state = self.state.clone();
        let snapshot = state
            .wait_for(|snapshot| snapshot.ended.is_some())
            .await
            .map_err(|_| ShimError::Ending)?;
        snapshot.ended.clone().ok_or(ShimError::Ending)
    }

    async fn request<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T>>) -> Request,
    ) -> Result<T> {
        let answer = ask(&self.requests, request).await;
        answer.ok_or(ShimError::Ending)?
    }
}
