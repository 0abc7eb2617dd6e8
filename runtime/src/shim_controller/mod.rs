//! [`ShimController`]: client of one box's shim. It calls containerd's Sandbox and Task services and the ShimLog extension
//! over ttrpc, with a timeout on every call.
//!
//! It holds the connection only; the state of boxes and containers is in their driver (`litebox::driver`). [`program`]
//! runs the shim binary, [`events`] receives its events.
//!
//! Dropping a call cancels it on this side only; the shim completes it. All calls are idempotent by id, so callers may
//! retry.

pub mod events;
pub mod program;

pub use boxlite_sys::process::ProcessId;
pub use program::ShimProgram;

use crate::error::{ErrorKind, Result, RuntimeError};
use boxlite_portal::error::clean;
use boxlite_proto::names;
use boxlite_proto::shim::shim as shim_log;
use boxlite_proto::shim::shim_ttrpc::ShimLogClient;
use boxlite_proto::vmm::{SandboxOptions, VmmKind};
use boxlite_sys::unix_socket;
use boxlite_telemetry::{Kind, Span, traced};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::sandbox_api;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::TaskClient;
use serde::{Deserialize, Serialize};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;
use ttrpc::context::{Context, with_duration};

/// Timeout for connecting and for calls that only read the shim's state.
pub const QUICK_CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for calls that make one call to the guest: signals, limits.
pub const GUEST_CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for calls that mount, fork and clean up in the guest.
pub const TASK_CALL_TIMEOUT: Duration = Duration::from_secs(180);
/// Time a stopping guest has to sync its disks; passed to the shim.
pub const STOP_GRACE: Duration = Duration::from_secs(5);
/// Timeout of StopSandbox: the grace period, then killing the VMM.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of ShutdownSandbox, and of the shim's exit after it.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(15);
/// Interval for polling an exiting process.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Persistent state of a shim, needed to reconnect to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimState {
    /// Address as `unix://…`.
    pub address: String,
    /// Process of the shim; `None` if it did not report one.
    pub process: Option<ProcessId>,
    /// VMM that the shim runs.
    pub vmm: VmmKind,
}

/// Exit of a container as reported by the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskExit {
    /// Exit code, 0–255.
    pub code: i32,
    /// Time in ns since the epoch; 0 if the shim did not report it.
    pub at_ns: i64,
}

/// State of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// Created but not started.
    Created,
    /// Running or paused.
    Running,
    /// Exited.
    Stopped(TaskExit),
    /// Not known to the shim.
    Unknown,
}

/// Arguments of Task.Create.
#[derive(Debug, Clone)]
pub struct TaskCreate {
    /// Container id.
    pub id: String,
    /// Bundle with config.json.
    pub bundle: PathBuf,
    /// EROFS files on the host, lowest first.
    pub layers: Vec<PathBuf>,
    /// CRI log file; `None` discards the output.
    pub log_path: Option<PathBuf>,
    /// True to allocate a terminal.
    pub terminal: bool,
}

/// Connection to one shim. Clones share it.
#[derive(Clone)]
pub struct ShimController {
    box_id: String,
    state: ShimState,
    sandbox: SandboxClient,
    task: TaskClient,
    log: ShimLogClient,
}

impl std::fmt::Debug for ShimController {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShimController")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl ShimController {
    /// Runs `start` and connects. After an error a shim may be running: call [`ShimProgram::delete`].
    ///
    /// # Errors
    /// Those of [`ShimProgram::start`], `ShimConnection`, `Shim`.
    pub async fn spawn(
        program: &ShimProgram,
        box_id: &str,
        bundle: &Path,
        vmm: VmmKind,
    ) -> Result<Self> {
        let starting = program.start(box_id, bundle);
        let address = traced("start shim", Kind::Internal, starting).await?;
        let mut controller = Self::connect(
            box_id,
            ShimState {
                address,
                process: None,
                vmm,
            },
        )
        .await?;
        controller.state.process = controller.identify().await?;
        Ok(controller)
    }

    /// Connects to the shim of `state` and checks that it serves.
    ///
    /// # Errors
    /// `ShimConnection` if no shim serves there, `Shim`.
    pub async fn adopt(box_id: &str, state: ShimState) -> Result<Self> {
        let controller = Self::connect(box_id, state).await?;
        let process = controller.identify().await?;
        if process != controller.state.process {
            return Err(RuntimeError::ShimConnection {
                action: format!("connect to the shim of pod sandbox {box_id:?}"),
                reason: format!(
                    "process {process:?} serves at the address of process {:?}",
                    controller.state.process
                ),
            });
        }
        Ok(controller)
    }

    async fn connect(box_id: &str, state: ShimState) -> Result<Self> {
        let fail = |reason: String| RuntimeError::ShimConnection {
            action: format!("connect to the shim of pod sandbox {box_id:?}"),
            reason,
        };
        let path = state
            .address
            .strip_prefix("unix://")
            .ok_or_else(|| fail(format!("{} is not a unix socket", state.address)))?;
        let stream =
            tokio::time::timeout(QUICK_CALL_TIMEOUT, unix_socket::connect(Path::new(path)))
                .await
                .map_err(|_| fail(format!("no connection within {QUICK_CALL_TIMEOUT:?}")))?
                .map_err(|error| fail(format!("{path}: {error}")))?;
        let client =
            ttrpc::asynchronous::Client::new(ttrpc::asynchronous::transport::Socket::new(stream));
        Ok(Self {
            box_id: box_id.to_owned(),
            state,
            sandbox: SandboxClient::new(client.clone()),
            task: TaskClient::new(client.clone()),
            log: ShimLogClient::new(client),
        })
    }

    /// Asks the shim for its process.
    async fn identify(&self) -> Result<Option<ProcessId>> {
        let request = api::ConnectRequest {
            id: self.box_id.clone(),
            ..Default::default()
        };
        let answer = call(
            format!("query the shim of pod sandbox {:?}", self.box_id),
            QUICK_CALL_TIMEOUT,
            |context| self.task.connect(context, &request),
        )
        .await?;
        Ok(i32::try_from(answer.shim_pid)
            .ok()
            .filter(|pid| *pid > 0)
            .and_then(ProcessId::of))
    }

    /// Returns the state to persist.
    pub fn state(&self) -> &ShimState {
        &self.state
    }

    /// Returns true if the shim's process is alive. One that did not report its pid counts as alive.
    pub fn alive(&self) -> bool {
        self.state.process.as_ref().is_none_or(ProcessId::alive)
    }

    /// Calls Sandbox.CreateSandbox.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn create_sandbox(
        &self,
        bundle: &Path,
        netns: Option<&Path>,
        options: &SandboxOptions,
    ) -> Result<()> {
        let request = sandbox_api::CreateSandboxRequest {
            sandbox_id: self.box_id.clone(),
            bundle_path: bundle.display().to_string(),
            netns_path: netns
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            options: Some(json_any(names::SANDBOX_OPTIONS_TYPE, options)?).into(),
            ..Default::default()
        };
        traced_call(
            "Sandbox/CreateSandbox",
            "create the VM".to_owned(),
            GUEST_CALL_TIMEOUT,
            |context| self.sandbox.create_sandbox(context, &request),
        )
        .await
        .map(drop)
    }

    /// Calls Sandbox.StartSandbox, which boots the VM and initializes the guest within `limit`. Returns at once if the VMM
    /// dies.
    ///
    /// # Errors
    /// `Shim` with the guest's last console lines, `ShimConnection`, `Deadline`.
    pub async fn start_sandbox(&self, limit: Duration) -> Result<()> {
        let request = sandbox_api::StartSandboxRequest {
            sandbox_id: self.box_id.clone(),
            ..Default::default()
        };
        traced_call(
            "Sandbox/StartSandbox",
            "boot the VM".to_owned(),
            limit,
            |context| self.sandbox.start_sandbox(context, &request),
        )
        .await
        .map(drop)
    }

    /// Calls Sandbox.SandboxStatus. Returns whether the VM is running, and the shim's stage timers in ms (keys
    /// `<stage>_ms` of the info map).
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn sandbox_status(&self) -> Result<(bool, Vec<(String, u64)>)> {
        let request = sandbox_api::SandboxStatusRequest {
            sandbox_id: self.box_id.clone(),
            verbose: true,
            ..Default::default()
        };
        let status = call(
            format!("get the status of pod sandbox {:?}", self.box_id),
            QUICK_CALL_TIMEOUT,
            |context| self.sandbox.sandbox_status(context, &request),
        )
        .await?;
        let mut timers: Vec<(String, u64)> = status
            .info
            .iter()
            .filter_map(|(key, value)| {
                Some((key.strip_suffix("_ms")?.to_owned(), value.parse().ok()?))
            })
            .collect();
        timers.sort();
        Ok((status.state == "SANDBOX_READY", timers))
    }

    /// Calls Sandbox.WaitSandbox, which returns when the VM has ended. Has no timeout.
    ///
    /// # Errors
    /// `ShimConnection` if the shim dies, `Shim`.
    pub async fn wait_sandbox(&self) -> Result<TaskExit> {
        let request = sandbox_api::WaitSandboxRequest {
            sandbox_id: self.box_id.clone(),
            ..Default::default()
        };
        let answer = self
            .sandbox
            .wait_sandbox(Context::default(), &request)
            .await;
        let answer = answer.map_err(|error| {
            wrap(
                format!("wait for pod sandbox {:?}", self.box_id),
                None,
                error,
            )
        })?;
        Ok(task_exit(answer.exit_status, answer.exited_at.as_ref()))
    }

    /// Calls Sandbox.StopSandbox, which ends the VM; idempotent.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn stop_sandbox(&self) -> Result<()> {
        let request = sandbox_api::StopSandboxRequest {
            sandbox_id: self.box_id.clone(),
            timeout_secs: u32::try_from(STOP_GRACE.as_secs()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let answer = traced_call(
            "Sandbox/StopSandbox",
            format!("stop the VM of pod sandbox {:?}", self.box_id),
            STOP_TIMEOUT,
            |context| self.sandbox.stop_sandbox(context, &request),
        )
        .await;
        ignore_not_found(answer.map(drop))
    }

    /// Calls Sandbox.ShutdownSandbox, which ends the shim, and waits until its process has exited.
    ///
    /// # Errors
    /// `Deadline` if it does not exit.
    pub async fn shutdown(&self) -> Result<()> {
        let request = sandbox_api::ShutdownSandboxRequest {
            sandbox_id: self.box_id.clone(),
            ..Default::default()
        };
        let answer = call(
            format!("shut down the shim of pod sandbox {:?}", self.box_id),
            SHUTDOWN_TIMEOUT,
            |context| self.sandbox.shutdown_sandbox(context, &request),
        )
        .await;
        match answer {
            // A shim may exit before its response arrives.
            Ok(_) | Err(RuntimeError::ShimConnection { .. }) => {}
            Err(error) => return Err(error),
        }
        self.wait_exit(SHUTDOWN_TIMEOUT).await
    }

    /// Waits until the shim's process has exited.
    ///
    /// # Errors
    /// `Deadline`.
    pub async fn wait_exit(&self, limit: Duration) -> Result<()> {
        let Some(process) = &self.state.process else {
            return Ok(());
        };
        let poll = async {
            while process.alive() {
                tokio::time::sleep(EXIT_POLL_INTERVAL).await;
            }
        };
        tokio::time::timeout(limit, poll)
            .await
            .map_err(|_| RuntimeError::Deadline {
                detail: format!("shim process {} did not exit", process.pid),
                limit,
            })
    }

    /// Calls Task.Create; returns the pid in the guest.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn create_task(&self, create: &TaskCreate) -> Result<u32> {
        let rootfs = create.layers.iter().map(|layer| api::Mount {
            type_: "erofs".into(),
            source: layer.display().to_string(),
            options: vec!["ro".into()],
            ..Default::default()
        });
        let stdout = create
            .log_path
            .as_ref()
            .map(|path| format!("{}://{}", names::CRI_LOG_SCHEME, path.display()));
        let request = api::CreateTaskRequest {
            id: create.id.clone(),
            bundle: create.bundle.display().to_string(),
            rootfs: rootfs.collect(),
            terminal: create.terminal,
            stdout: stdout.unwrap_or_default(),
            ..Default::default()
        };
        let answer = traced_call(
            "Task/Create",
            format!("create container {:?}", create.id),
            TASK_CALL_TIMEOUT,
            |context| self.task.create(context, &request),
        )
        .await?;
        Ok(answer.pid)
    }

    /// Calls Task.Start; returns the pid in the guest.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn start_task(&self, id: &str) -> Result<u32> {
        let request = api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = traced_call(
            "Task/Start",
            format!("start container {id:?}"),
            TASK_CALL_TIMEOUT,
            |context| self.task.start(context, &request),
        )
        .await?;
        Ok(answer.pid)
    }

    /// Calls Task.Kill with a Linux signal number; succeeds if the task has exited or does not exist.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn kill_task(&self, id: &str, signal: i32, all: bool) -> Result<()> {
        let request = api::KillRequest {
            id: id.to_owned(),
            signal: u32::try_from(signal).unwrap_or(9),
            all,
            ..Default::default()
        };
        let answer = call(
            format!("signal container {id:?}"),
            GUEST_CALL_TIMEOUT,
            |context| self.task.kill(context, &request),
        )
        .await;
        ignore_not_found(answer.map(drop))
    }

    /// Calls Task.Delete; idempotent.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn delete_task(&self, id: &str) -> Result<()> {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call(
            format!("delete container {id:?}"),
            TASK_CALL_TIMEOUT,
            |context| self.task.delete(context, &request),
        )
        .await;
        ignore_not_found(answer.map(drop))
    }

    /// Calls Task.State.
    ///
    /// # Errors
    /// `Shim` (kind NotFound if the task does not exist), `ShimConnection`, `Deadline`.
    pub async fn task_state(&self, id: &str) -> Result<TaskState> {
        let answer = self.state_of_task(id).await?;
        let exit = task_exit(answer.exit_status, answer.exited_at.as_ref());
        Ok(match answer.status.enum_value_or_default() {
            api::Status::CREATED => TaskState::Created,
            api::Status::RUNNING | api::Status::PAUSED | api::Status::PAUSING => TaskState::Running,
            api::Status::STOPPED => TaskState::Stopped(exit),
            api::Status::UNKNOWN => TaskState::Unknown,
        })
    }

    /// Calls Task.State; returns the pid in the guest. The shim knows it, so no guest is asked.
    ///
    /// # Errors
    /// Those of [`Self::task_state`].
    pub async fn task_pid(&self, id: &str) -> Result<u32> {
        Ok(self.state_of_task(id).await?.pid)
    }

    async fn state_of_task(&self, id: &str) -> Result<api::StateResponse> {
        let request = api::StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        call(
            format!("get the state of container {id:?}"),
            QUICK_CALL_TIMEOUT,
            |context| self.task.state(context, &request),
        )
        .await
    }

    /// Calls Task.Wait, which returns when the container has exited. Has no timeout.
    ///
    /// # Errors
    /// `ShimConnection` if the shim dies, `Shim`.
    pub async fn wait_task(&self, id: &str) -> Result<TaskExit> {
        let request = api::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.task.wait(Context::default(), &request).await;
        let answer =
            answer.map_err(|error| wrap(format!("wait for container {id:?}"), None, error))?;
        Ok(task_exit(answer.exit_status, answer.exited_at.as_ref()))
    }

    /// Calls Task.Update with OCI LinuxResources in JSON.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn update_task(&self, id: &str, resources_json: Vec<u8>) -> Result<()> {
        let request = api::UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(Any {
                // containerd's type URL: the package path of runtime-spec.
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: resources_json,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        call(
            format!("update the resources of container {id:?}"),
            GUEST_CALL_TIMEOUT,
            |context| self.task.update(context, &request),
        )
        .await
        .map(drop)
    }

    /// Calls ShimLog.ReopenLog.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = shim_log::ReopenLogRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        call(
            format!("reopen the log of container {id:?}"),
            QUICK_CALL_TIMEOUT,
            |context| self.log.reopen_log(context, &request),
        )
        .await
        .map(drop)
    }
}

/// Runs one ttrpc call with a timeout on both sides.
async fn call<T, F>(action: String, limit: Duration, invoke: impl FnOnce(Context) -> F) -> Result<T>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    let future = invoke(with_duration(limit));
    match tokio::time::timeout(limit, future).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(wrap(action, Some(limit), error)),
        Err(_) => Err(deadline(&action, limit)),
    }
}

/// As [`call`], in a span whose position is sent with the request.
async fn traced_call<T, F>(
    rpc: &'static str,
    action: String,
    limit: Duration,
    invoke: impl FnOnce(Context) -> F,
) -> Result<T>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    let span = Span::child(rpc, Kind::Client);
    let headers = span.context().headers();
    let called = call(action, limit, |mut context| {
        for (name, value) in headers {
            context.add(name.to_owned(), value);
        }
        invoke(context)
    });
    span.run(called).await
}

fn deadline(action: &str, limit: Duration) -> RuntimeError {
    RuntimeError::Deadline {
        detail: format!("failed to {action}: the shim did not answer"),
        limit,
    }
}

fn wrap(action: String, limit: Option<Duration>, error: ttrpc::Error) -> RuntimeError {
    use ttrpc::Code;
    let status = match error {
        ttrpc::Error::RpcStatus(status) => status,
        other => {
            let reason = other.to_string();
            return RuntimeError::ShimConnection { action, reason };
        }
    };
    let kind = match status.code() {
        // ttrpc's client returns this without a message when the context's deadline passes.
        Code::DEADLINE_EXCEEDED => match limit {
            Some(limit) if status.message().is_empty() => return deadline(&action, limit),
            _ => ErrorKind::DeadlineExceeded,
        },
        Code::NOT_FOUND => ErrorKind::NotFound,
        Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
        Code::INVALID_ARGUMENT | Code::OUT_OF_RANGE => ErrorKind::InvalidArgument,
        Code::FAILED_PRECONDITION | Code::ABORTED => ErrorKind::FailedPrecondition,
        Code::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
        Code::UNAVAILABLE => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    RuntimeError::Shim {
        action,
        kind,
        message: clean(status.message()),
    }
}

/// Turns NotFound into success, for calls that end or remove something.
fn ignore_not_found(result: Result<()>) -> Result<()> {
    match result {
        Err(RuntimeError::Shim {
            kind: ErrorKind::NotFound,
            ..
        }) => Ok(()),
        other => other,
    }
}

fn json_any(type_url: &str, value: &impl Serialize) -> Result<Any> {
    let value = serde_json::to_vec(value).map_err(|error| RuntimeError::Internal {
        detail: format!("failed to encode {type_url}: {error}"),
    })?;
    Ok(Any {
        type_url: type_url.to_owned(),
        value,
        ..Default::default()
    })
}

fn task_exit(status: u32, at: Option<&Timestamp>) -> TaskExit {
    TaskExit {
        code: i32::try_from(status.min(255)).unwrap_or(255),
        at_ns: at.map_or(0, |at| {
            at.seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(i64::from(at.nanos))
        }),
    }
}
