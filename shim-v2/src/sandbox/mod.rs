//! [`Sandbox`]: the one pod VM of this shim, as the services see it: a handle to its driver and to its containers.
//!
//! One task, the [`driver`], writes the state; all others send it requests and watch. The handle holds no lock across an
//! await. The VM's parts are [`machine`]'s.
//!
//! ```text
//!  (none) ──create──► Created ──start──► Starting ──guest ready──► Ready
//!                        ▲                  │  failed or stopped     │ stop, VM died
//!                        └──────────────────┘                        ▼
//!                                               Stopping ──────► Stopped (for good)
//! ```

pub mod driver;
pub mod machine;
pub mod oom;
pub mod options;

use crate::container::Containers;
use crate::error::{Result, ShimError};
use crate::pod::{Context, Guest};
use driver::Request;
use machine::Machine;
use options::Plan;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Requests that wait for the driver. Callers beyond it wait at the door.
const REQUEST_QUEUE: usize = 64;

/// Where the sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// CreateSandbox has not been called.
    None,
    /// Described, nothing runs.
    Created,
    /// The VM is being built or boots.
    Starting,
    /// The guest takes containers.
    Ready,
    /// The VM is being ended.
    Stopping,
    /// The VM has ended, by request or not. Nothing comes after.
    Stopped,
}

impl Phase {
    /// As SandboxStatus says it: containerd knows SANDBOX_READY and SANDBOX_NOTREADY.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "SANDBOX_READY",
            Self::None | Self::Created | Self::Starting | Self::Stopping | Self::Stopped => {
                "SANDBOX_NOTREADY"
            }
        }
    }
}

/// How the VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit status for WaitSandbox: 0 after a stop, 137 for a VM that died.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at_unix_ns: i64,
    /// In words.
    pub how: String,
}

/// What the driver publishes. Every publication has a higher generation.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Counts publications.
    pub generation: u64,
    /// Where it is.
    pub phase: Phase,
    /// Pid of the vmm child on the host; 0 where none runs.
    pub pid: u32,
    /// When CreateSandbox came, nanoseconds since the epoch.
    pub created_at_unix_ns: i64,
    /// Set in Stopped.
    pub ended: Option<Ended>,
    /// What was asked for; from Created on.
    pub plan: Option<Arc<Plan>>,
    /// Facts of the boot for SandboxStatus(verbose): kernel, agent, stage times.
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

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Sandbox {
    context: Context,
    requests: mpsc::Sender<Request>,
    state: watch::Receiver<Snapshot>,
    guest: watch::Receiver<Option<Guest>>,
    containers: Arc<Containers>,
}

impl Sandbox {
    /// Starts the driver over `machine`. It ends after [`Sandbox::shutdown`].
    pub fn spawn(context: Context, machine: Arc<dyn Machine>) -> Self {
        let (requests, receiver) = mpsc::channel(REQUEST_QUEUE);
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

    /// Id, bundle, publisher, tasks.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The containers of the pod.
    pub fn containers(&self) -> &Arc<Containers> {
        &self.containers
    }

    /// The state as last published.
    pub fn snapshot(&self) -> Snapshot {
        self.state.borrow().clone()
    }

    /// The guest, where it takes containers.
    ///
    /// # Errors
    /// WrongState before it is ready, VmGone after its end.
    pub fn guest(&self, action: &'static str) -> Result<Guest> {
        if let Some(guest) = self.guest.borrow().clone() {
            return Ok(guest);
        }
        let snapshot = self.snapshot();
        match snapshot.ended {
            Some(ended) => Err(ShimError::VmGone {
                id: self.context.id.to_string(),
                how: ended.how,
            }),
            None => Err(ShimError::WrongState {
                what: "sandbox",
                id: self.context.id.to_string(),
                state: format!("{:?}", snapshot.phase).to_lowercase(),
                action,
            }),
        }
    }

    /// Describes the pod. The same plan again is fine.
    ///
    /// # Errors
    /// AlreadyExists for another plan; WrongState after the end.
    pub async fn create(&self, plan: Plan) -> Result<()> {
        self.ask(|reply| Request::Create(Box::new(plan), reply))
            .await
    }

    /// Boots the VM; joins a start under way and answers at once when it is ready. Dropping the future does not stop it.
    ///
    /// # Errors
    /// The failed step; everything it did is undone by then and another start may follow.
    pub async fn start(&self) -> Result<Snapshot> {
        self.ask(Request::Start).await
    }

    /// Ends the VM: containers first, `grace` for the guest to shut down, then by force. Succeeds on what has ended.
    ///
    /// # Errors
    /// Only when the shim itself is ending.
    pub async fn stop(&self, grace: Duration) -> Result<()> {
        self.ask(|reply| Request::Stop(grace, reply)).await
    }

    /// Ends the VM and the driver.
    ///
    /// # Errors
    /// Only when the shim is ending already.
    pub async fn shutdown(&self) -> Result<()> {
        self.ask(Request::Shutdown).await
    }

    /// Waits for the end of the VM. Dropping the future changes nothing.
    ///
    /// # Errors
    /// When the driver ended without one.
    pub async fn wait(&self) -> Result<Ended> {
        let mut state = self.state.clone();
        let snapshot = state
            .wait_for(|snapshot| snapshot.ended.is_some())
            .await
            .map_err(|_| ShimError::Ending)?;
        snapshot.ended.clone().ok_or(ShimError::Ending)
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T>>) -> Request,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(request(reply))
            .await
            .map_err(|_| ShimError::Ending)?;
        answer.await.map_err(|_| ShimError::Ending)?
    }
}
