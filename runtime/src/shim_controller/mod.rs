//! [`ShimController`]: one box's shim — containerd's Sandbox and Task services over ttrpc, and the ShimLog extension
//! — with a limit on every call.
//!
//! It keeps no state beside the connection: what a box or container is, its driver (`litebox::driver`) knows. Running
//! the shim's program is [`program`]'s, receiving its events [`events`]'s.
//!
//! A dropped call is cancelled on this side only; the shim carries it out. All of them are idempotent by id there, so
//! the caller asks again.

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

/// For connecting and for calls that only look: the shim is a process of this host.
pub const QUICK_LIMIT: Duration = Duration::from_secs(10);
/// For calls that make the shim call its guest once: signals, limits.
pub const GUEST_LIMIT: Duration = Duration::from_secs(30);
/// For calls that mount, fork and clean up in the guest.
pub const WORK_LIMIT: Duration = Duration::from_secs(180);
/// What a stopping guest gets for its disks, told to the shim.
pub const STOP_GRACE: Duration = Duration::from_secs(5);
/// For StopSandbox over all: the grace, then the VMM's kill.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// For ShutdownSandbox, and then for the shim's process to be gone.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(15);
/// Between two looks at a process that is going.
const GONE_POLL: Duration = Duration::from_millis(20);

/// What is written down about a shim, to find it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimRecord {
    /// `unix://…`.
    pub address: String,
    /// Its process; `None` where it did not tell.
    pub process: Option<ProcessId>,
    /// VMM it runs.
    pub vmm: VmmKind,
}

/// How a container ended, as the shim tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskExit {
    /// 0–255.
    pub code: i32,
    /// ns since the epoch; 0 where the shim did not say.
    pub at_ns: i64,
}

/// What a task is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// Created, not started.
    Created,
    /// Running or paused.
    Running,
    /// Ended.
    Stopped(TaskExit),
    /// The shim cannot tell.
    Unknown,
}

/// What Task.Create needs.
#[derive(Debug, Clone)]
pub struct TaskCreate {
    /// Container id.
    pub id: String,
    /// Its bundle, with config.json.
    pub bundle: PathBuf,
    /// EROFS files on the host, lowest first.
    pub layers: Vec<PathBuf>,
    /// CRI log; `None`: none.
    pub log_path: Option<PathBuf>,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// The connection to one shim. Clones share it.
#[derive(Clone)]
pub struct ShimController {
    box_id: String,
    record: ShimRecord,
    sandbox: SandboxClient,
    task: TaskClient,
    log: ShimLogClient,
}

impl std::fmt::Debug for ShimController {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShimController")
            .field("record", &self.record)
            .finish_non_exhaustive()
    }
}

impl ShimController {
    /// Runs `start` and connects. On an error a daemon may be left: follow it with [`ShimProgram::delete`].
    ///
    /// # Errors
    /// Those of [`ShimProgram::start`], `ShimConnection`, `Shim`.
    pub async fn spawn(
        program: &ShimProgram,
        box_id: &str,
        bundle: &Path,
        vmm: VmmKind,
    ) -> Result<Self> {
        let address = program.start(box_id, bundle).await?;
        let mut controller = Self::connect(
            box_id,
            ShimRecord {
                address,
                process: None,
                vmm,
            },
        )
        .await?;
        controller.record.process = controller.identify().await?;
        Ok(controller)
    }

    /// Connects to the shim of `record` and makes sure that it serves.
    ///
    /// # Errors
    /// `ShimConnection` where nobody serves there, `Shim`.
    pub async fn adopt(box_id: &str, record: ShimRecord) -> Result<Self> {
        let controller = Self::connect(box_id, record).await?;
        let process = controller.identify().await?;
        if process != controller.record.process {
            return Err(RuntimeError::ShimConnection {
                call: "Task.Connect",
                reason: format!(
                    "another process ({process:?}) serves at the address of {:?}",
                    controller.record.process
                ),
            });
        }
        Ok(controller)
    }

    async fn connect(box_id: &str, record: ShimRecord) -> Result<Self> {
        let fail = |reason: String| RuntimeError::ShimConnection {
            call: "connect",
            reason,
        };
        let path = record
            .address
            .strip_prefix("unix://")
            .ok_or_else(|| fail(format!("{} is no unix socket", record.address)))?;
        let stream = tokio::time::timeout(QUICK_LIMIT, unix_socket::connect(Path::new(path)))
            .await
            .map_err(|_| fail(format!("no connection within {QUICK_LIMIT:?}")))?
            .map_err(|error| fail(format!("{path}: {error}")))?;
        let client =
            ttrpc::asynchronous::Client::new(ttrpc::asynchronous::transport::Socket::new(stream));
        Ok(Self {
            box_id: box_id.to_owned(),
            record,
            sandbox: SandboxClient::new(client.clone()),
            task: TaskClient::new(client.clone()),
            log: ShimLogClient::new(client),
        })
    }

    /// The shim's process, as it tells itself.
    async fn identify(&self) -> Result<Option<ProcessId>> {
        let request = api::ConnectRequest {
            id: self.box_id.clone(),
            ..Default::default()
        };
        let answer = call("Task.Connect", QUICK_LIMIT, |context| {
            self.task.connect(context, &request)
        })
        .await?;
        Ok(i32::try_from(answer.shim_pid)
            .ok()
            .filter(|pid| *pid > 0)
            .and_then(ProcessId::of))
    }

    /// What to write down about it.
    pub fn record(&self) -> &ShimRecord {
        &self.record
    }

    /// Whether its process runs. One that never told its pid counts as running.
    pub fn alive(&self) -> bool {
        self.record.process.as_ref().is_none_or(ProcessId::alive)
    }

    /// Sandbox.CreateSandbox.
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
        call("Sandbox.CreateSandbox", GUEST_LIMIT, |context| {
            self.sandbox.create_sandbox(context, &request)
        })
        .await
        .map(drop)
    }

    /// Sandbox.StartSandbox: boots the VM and initialises the guest, within `limit`. VMM death ends it at once.
    ///
    /// # Errors
    /// `Shim` with the guest's last console lines, `ShimConnection`, `Deadline`.
    pub async fn start_sandbox(&self, limit: Duration) -> Result<()> {
        let request = sandbox_api::StartSandboxRequest {
            sandbox_id: self.box_id.clone(),
            ..Default::default()
        };
        call("Sandbox.StartSandbox", limit, |context| {
            self.sandbox.start_sandbox(context, &request)
        })
        .await
        .map(drop)
    }

    /// Sandbox.SandboxStatus: whether the VM runs, and the shim's own stage timers in ms (keys `<stage>_ms` of its
    /// info).
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn sandbox_status(&self) -> Result<(bool, Vec<(String, u64)>)> {
        let request = sandbox_api::SandboxStatusRequest {
            sandbox_id: self.box_id.clone(),
            verbose: true,
            ..Default::default()
        };
        let status = call("Sandbox.SandboxStatus", QUICK_LIMIT, |context| {
            self.sandbox.sandbox_status(context, &request)
        })
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

    /// Sandbox.WaitSandbox: returns when the VM ended. No limit; ends with the VM, the shim or the caller.
    ///
    /// # Errors
    /// `ShimConnection` when the shim is gone, `Shim`.
    pub async fn wait_sandbox(&self) -> Result<TaskExit> {
        let request = sandbox_api::WaitSandboxRequest {
            sandbox_id: self.box_id.clone(),
            ..Default::default()
        };
        let answer = self
            .sandbox
            .wait_sandbox(Context::default(), &request)
            .await;
        let answer = answer.map_err(|error| wrap("Sandbox.WaitSandbox", None, error))?;
        Ok(task_exit(answer.exit_status, answer.exited_at.as_ref()))
    }

    /// Sandbox.StopSandbox: ends the VM; ok where it has ended.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn stop_sandbox(&self) -> Result<()> {
        let request = sandbox_api::StopSandboxRequest {
            sandbox_id: self.box_id.clone(),
            timeout_secs: u32::try_from(STOP_GRACE.as_secs()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let answer = call("Sandbox.StopSandbox", STOP_LIMIT, |context| {
            self.sandbox.stop_sandbox(context, &request)
        })
        .await;
        ignore_not_found(answer.map(drop))
    }

    /// Sandbox.ShutdownSandbox: ends the shim itself, and waits until its process is gone.
    ///
    /// # Errors
    /// `Deadline` where it does not go.
    pub async fn shutdown(&self) -> Result<()> {
        let request = sandbox_api::ShutdownSandboxRequest {
            sandbox_id: self.box_id.clone(),
            ..Default::default()
        };
        let answer = call("Sandbox.ShutdownSandbox", SHUTDOWN_LIMIT, |context| {
            self.sandbox.shutdown_sandbox(context, &request)
        })
        .await;
        match answer {
            // A shim may be gone before its answer is.
            Ok(_) | Err(RuntimeError::ShimConnection { .. }) => {}
            Err(error) => return Err(error),
        }
        self.gone(SHUTDOWN_LIMIT).await
    }

    /// Waits until the shim's process is gone.
    ///
    /// # Errors
    /// `Deadline`.
    pub async fn gone(&self, limit: Duration) -> Result<()> {
        let Some(process) = &self.record.process else {
            return Ok(());
        };
        let poll = async {
            while process.alive() {
                tokio::time::sleep(GONE_POLL).await;
            }
        };
        tokio::time::timeout(limit, poll)
            .await
            .map_err(|_| RuntimeError::Deadline {
                what: format!("the end of shim process {}", process.pid),
                limit,
            })
    }

    /// Task.Create; answers the guest's pid.
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
        let answer = call("Task.Create", WORK_LIMIT, |context| {
            self.task.create(context, &request)
        })
        .await?;
        Ok(answer.pid)
    }

    /// Task.Start; answers the guest's pid.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn start_task(&self, id: &str) -> Result<u32> {
        let request = api::StartRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call("Task.Start", WORK_LIMIT, |context| {
            self.task.start(context, &request)
        })
        .await?;
        Ok(answer.pid)
    }

    /// Task.Kill with a Linux signal number; ok where the task has ended or is not there.
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
        let answer = call("Task.Kill", GUEST_LIMIT, |context| {
            self.task.kill(context, &request)
        })
        .await;
        ignore_not_found(answer.map(drop))
    }

    /// Task.Delete; ok where it is gone.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn delete_task(&self, id: &str) -> Result<()> {
        let request = api::DeleteRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call("Task.Delete", WORK_LIMIT, |context| {
            self.task.delete(context, &request)
        })
        .await;
        ignore_not_found(answer.map(drop))
    }

    /// Task.State.
    ///
    /// # Errors
    /// `Shim` (kind NotFound where there is no such task), `ShimConnection`, `Deadline`.
    pub async fn task_state(&self, id: &str) -> Result<TaskState> {
        let request = api::StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = call("Task.State", QUICK_LIMIT, |context| {
            self.task.state(context, &request)
        })
        .await?;
        let exit = task_exit(answer.exit_status, answer.exited_at.as_ref());
        Ok(match answer.status.enum_value_or_default() {
            api::Status::CREATED => TaskState::Created,
            api::Status::RUNNING | api::Status::PAUSED | api::Status::PAUSING => TaskState::Running,
            api::Status::STOPPED => TaskState::Stopped(exit),
            api::Status::UNKNOWN => TaskState::Unknown,
        })
    }

    /// Task.Wait: returns when the container ended. No limit; ends with the container, the shim or the caller.
    ///
    /// # Errors
    /// `ShimConnection` when the shim is gone, `Shim`.
    pub async fn wait_task(&self, id: &str) -> Result<TaskExit> {
        let request = api::WaitRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.task.wait(Context::default(), &request).await;
        let answer = answer.map_err(|error| wrap("Task.Wait", None, error))?;
        Ok(task_exit(answer.exit_status, answer.exited_at.as_ref()))
    }

    /// Task.Update with OCI LinuxResources as JSON.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn update_task(&self, id: &str, resources_json: Vec<u8>) -> Result<()> {
        let request = api::UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(Any {
                // containerd's name of the type (typeurl, the package path of runtime-spec).
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: resources_json,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        call("Task.Update", GUEST_LIMIT, |context| {
            self.task.update(context, &request)
        })
        .await
        .map(drop)
    }

    /// ShimLog.ReopenLog.
    ///
    /// # Errors
    /// `Shim`, `ShimConnection`, `Deadline`.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let request = shim_log::ReopenLogRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        call("ShimLog.ReopenLog", QUICK_LIMIT, |context| {
            self.log.reopen_log(context, &request)
        })
        .await
        .map(drop)
    }
}

/// One ttrpc call with a limit on both sides.
async fn call<T, F>(
    name: &'static str,
    limit: Duration,
    make: impl FnOnce(Context) -> F,
) -> Result<T>
where
    F: Future<Output = ttrpc::Result<T>>,
{
    let future = make(with_duration(limit));
    match tokio::time::timeout(limit, future).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(wrap(name, Some(limit), error)),
        Err(_) => Err(deadline(name, limit)),
    }
}

fn deadline(call: &'static str, limit: Duration) -> RuntimeError {
    RuntimeError::Deadline {
        what: format!("the shim's answer to {call}"),
        limit,
    }
}

fn wrap(call: &'static str, limit: Option<Duration>, error: ttrpc::Error) -> RuntimeError {
    use ttrpc::Code;
    let status = match error {
        ttrpc::Error::RpcStatus(status) => status,
        other => {
            let reason = other.to_string();
            return RuntimeError::ShimConnection { call, reason };
        }
    };
    let kind = match status.code() {
        // ttrpc's client makes this one itself when its context's time is over.
        Code::DEADLINE_EXCEEDED => match limit {
            Some(limit) if status.message().is_empty() => return deadline(call, limit),
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
        call,
        kind,
        message: clean(status.message()),
    }
}

/// Success where what was to be ended or removed is not there.
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
        what: format!("{type_url} cannot be written: {error}"),
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
