//! The services containerd.task.v2.Task and v3.Task.

use super::Service;
use crate::container::process::{Phase, Process, ProcessConfig, State};
use crate::container::{spec, stats};
use crate::containerd::etc;
use crate::containerd::pause::PauseTask;
use crate::error::ShimError;
use crate::logs::{Sink, Stdio};
use crate::sandbox::options::SandboxOwner;
use crate::time;
use crate::trace;
use async_trait::async_trait;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::TaskExecAdded;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use std::path::Path;
use std::time::Duration;

/// Timeout of a read of counters in the guest.
const STATS_TIMEOUT: Duration = Duration::from_secs(10);

impl Service {
    fn process(&self, id: &str, exec_id: &str) -> ttrpc::Result<Process> {
        Ok(self.sandbox.containers().get(id)?.process(exec_id)?)
    }

    /// Returns the pod's pause container if the ids refer to it.
    fn pause_task(&self, id: &str, exec_id: &str) -> Option<PauseTask> {
        self.first.pause(id).filter(|_| exec_id.is_empty())
    }
}

#[async_trait]
impl Task for Service {
    async fn create(
        &self,
        context: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let service = self.clone();
        let span = trace::server(context, "Task/Create", self.sandbox.context());
        span.set("container.id", &request.id);
        let pid = span
            .run(self.detached(async move {
                if let Some(pid) = service.first_task(&request).await? {
                    return Ok(pid);
                }
                let sandbox = &service.sandbox;
                let guest = sandbox.guest("create a container")?;
                let mut spec = spec::load(Path::new(&request.bundle))?;
                etc::mount(&sandbox.context().bundle, &mut spec);
                sandbox.containers().create(&guest, &request, spec).await
            }))
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(
        &self,
        context: &TtrpcContext,
        request: StartRequest,
    ) -> ttrpc::Result<StartResponse> {
        if let Some(pause) = self.pause_task(&request.id, &request.exec_id) {
            return Ok(StartResponse {
                pid: pause.start()?,
                ..Default::default()
            });
        }
        let process = self.process(&request.id, &request.exec_id)?;
        let span = trace::server(context, "Task/Start", self.sandbox.context());
        span.set("container.id", &request.id);
        let pid = span.run(process.start()).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        if let Some(pause) = self.pause_task(&request.id, &request.exec_id) {
            return Ok(state_response(pause.config(), &pause.state()));
        }
        let process = self.process(&request.id, &request.exec_id)?;
        Ok(state_response(process.config(), &process.state()))
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let ended = match self.pause_task(&request.id, &request.exec_id) {
            Some(pause) => pause.wait().await?,
            None => self.process(&request.id, &request.exec_id)?.wait().await?,
        };
        Ok(WaitResponse {
            exit_status: ended.status,
            exited_at: MessageField::some(time::timestamp(ended.at_unix_ns)),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        if let Some(pause) = self.pause_task(&request.id, &request.exec_id) {
            pause.kill(request.signal)?;
            return Ok(Empty::default());
        }
        let process = self.process(&request.id, &request.exec_id)?;
        process.kill(request.signal, request.all).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        if let Some(pause) = self.pause_task(&request.id, "") {
            return Err(pause.refuse("exec in it").into());
        }
        let container = self.sandbox.containers().get(&request.id)?;
        if request.exec_id.is_empty() {
            return Err(invalid("exec_id", "empty"));
        }
        if container.init.state().phase != Phase::Running {
            return Err(ShimError::WrongState {
                kind: "container",
                id: request.id,
                state: format!("{:?}", container.init.state().phase).to_lowercase(),
                action: "exec in it",
            }
            .into());
        }
        let context = self.sandbox.context().clone();
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            guest_input: false,
        };
        let sink = Sink::open(&stdio, context.publisher.namespace(), &request.id).await?;
        let config = ProcessConfig {
            container: request.id.clone(),
            exec: request.exec_id.clone(),
            bundle: container.bundle.clone(),
            stdio,
        };
        let process = request.spec.into_option().unwrap_or_default().value;
        let guest = container.guest.clone();
        container.add_exec(&request.exec_id, || {
            Process::spawn(&context, &guest, config, sink, 0, Some(process))
        })?;
        context.publisher.publish(&TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        });
        Ok(Empty::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        if let Some(pause) = self.pause_task(&request.id, &request.exec_id) {
            let state = pause.delete()?;
            self.first.remove_pause();
            return Ok(delete_response(&state));
        }
        let containers = self.sandbox.containers().clone();
        let state = if request.exec_id.is_empty() {
            let id = request.id.clone();
            self.detached(async move { containers.delete(&id).await })
                .await?
        } else {
            let container = containers.get(&request.id)?;
            let process = container.process(&request.exec_id)?;
            let exec_id = request.exec_id.clone();
            self.detached(async move {
                let state = process.delete().await?;
                process.close().await;
                container.remove_exec(&exec_id);
                Ok(state)
            })
            .await?
        };
        Ok(delete_response(&state))
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        if let Some(pause) = self.pause_task(&request.id, "") {
            return Ok(pids_response([pause.state().pid]));
        }
        let container = self.sandbox.containers().get(&request.id)?;
        let reported = container
            .guest
            .call(container.guest.session.container().pids(&request.id))
            .await;
        // A containerd that restarts and receives no pid assumes that the task was never created: it deletes the task, and
        // its exit status is lost. The guest reports no pid for an exited task, even before the exit is known here.
        let init = container.init.state();
        let pids = match reported {
            Ok(pids) if !pids.is_empty() => pids,
            Err(error) if init.phase != Phase::Stopped => return Err(error.into()),
            Ok(_) | Err(_) => vec![init.pid],
        };
        Ok(pids_response(pids))
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let pause = self.pause_task(&request.id, &request.exec_id);
        if request.stdin && pause.is_none() {
            self.process(&request.id, &request.exec_id)?
                .close_input()
                .await?;
        }
        Ok(Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let process = self.process(&request.id, &request.exec_id)?;
        process.resize(request.height, request.width).await?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        if self.pause_task(&request.id, "").is_some() {
            // containerd sets the pod's limits on its cgroup on the host.
            return Ok(Empty::default());
        }
        let container = self.sandbox.containers().get(&request.id)?;
        let resources = request.resources.into_option().unwrap_or_default().value;
        let (guest, id) = (container.guest.clone(), request.id);
        self.detached(async move {
            let containers = guest.session.container();
            guest.call(containers.update(&id, resources)).await
        })
        .await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        if self.pause_task(&request.id, "").is_some() {
            let (stats, _) = self.pod_stats().await?;
            return Ok(StatsResponse {
                stats: MessageField::some(stats),
                ..Default::default()
            });
        }
        let container = self.sandbox.containers().get(&request.id)?;
        let session = &container.guest.session;
        let reply = container
            .guest
            .call(session.container().stats(&request.id, false, STATS_TIMEOUT))
            .await?;
        let stats = stats::any(&reply.cgroup.unwrap_or_default(), &[], self.stats_limits())
            .map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        if let Some(pause) = self.pause_task(&request.id, "") {
            return Err(pause.refuse("freeze it").into());
        }
        self.process(&request.id, "")?.pause(true).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.process(&request.id, "")?.pause(false).await?;
        Ok(Empty::default())
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = match self.sandbox.containers().get(&request.id) {
            Ok(container) => container.init.state().pid,
            Err(_) => self.sandbox.snapshot().pid,
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        // containerd calls Shutdown after every delete. The shim ends with the last container of a pod without a sandbox
        // owner, or at once if `now` is set.
        if !self.sandbox.containers().is_empty() && !request.now {
            return Ok(Empty::default());
        }
        let owner = self.sandbox.snapshot().plan.map(|plan| plan.owner);
        let owned = matches!(owner, Some(SandboxOwner::Boxlite | SandboxOwner::Sandboxer));
        if !request.now && (owned || self.first.has_pause()) {
            return Ok(Empty::default());
        }
        self.shut_down().await?;
        Ok(Empty::default())
    }
}

fn invalid(field: &'static str, reason: &str) -> ttrpc::Error {
    ShimError::Invalid {
        field,
        reason: reason.to_owned(),
    }
    .into()
}

fn ended(state: &State) -> (u32, MessageField<Timestamp>) {
    match state.ended {
        Some(ended) => (
            ended.status,
            MessageField::some(time::timestamp(ended.at_unix_ns)),
        ),
        None => (0, MessageField::none()),
    }
}

fn state_response(config: &ProcessConfig, state: &State) -> StateResponse {
    let status = match state.phase {
        Phase::Created => Status::CREATED,
        Phase::Running => Status::RUNNING,
        Phase::Paused => Status::PAUSED,
        Phase::Stopped => Status::STOPPED,
    };
    let (exit_status, exited_at) = ended(state);
    StateResponse {
        id: config.id().to_owned(),
        bundle: config.bundle.display().to_string(),
        pid: state.pid,
        status: status.into(),
        stdin: config.stdio.stdin.clone(),
        stdout: config.stdio.stdout.clone(),
        stderr: config.stdio.stderr.clone(),
        terminal: config.stdio.terminal,
        exit_status,
        exited_at,
        exec_id: config.exec.clone(),
        ..Default::default()
    }
}

fn delete_response(state: &State) -> DeleteResponse {
    let (exit_status, exited_at) = ended(state);
    DeleteResponse {
        pid: state.pid,
        exit_status,
        exited_at,
        ..Default::default()
    }
}

fn pids_response(pids: impl IntoIterator<Item = u32>) -> PidsResponse {
    let info = |pid| ProcessInfo {
        pid,
        ..Default::default()
    };
    PidsResponse {
        processes: pids.into_iter().map(info).collect(),
        ..Default::default()
    }
}
