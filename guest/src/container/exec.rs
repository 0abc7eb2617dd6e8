//! Exec'd processes of a container.

use super::context::PodContext;
use super::error::ContainerError;
use super::execs::Slot;
use super::launcher::{Launcher, blocking, until_exec};
use super::{Container, spec};
use crate::boot::reaper::RawExit;
use crate::cgroup;
use crate::execution::stdio::{Pipes, terminal_ends};
use crate::execution::{Process, supervise};
use crate::spawner::wire::{ExecRequest as Plan, ProcessPlan, Request};
use boxlite_proto::boxlite::v1::{ContainerState, ExecRequest, Exit, container_event::Event};
use futures::FutureExt;
use futures::future::Shared;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

/// Maximum number of execs of a container, running or ended, that have not been deleted.
const MAX_EXECS: usize = 512;

/// Starts the process of the request, or returns the one with its id.
///
/// If the future is dropped, the process is still created; a repeated call returns it.
pub(crate) async fn exec(
    context: &Arc<PodContext>,
    container: &Arc<Container>,
    request: ExecRequest,
) -> Result<Arc<Process>, ContainerError> {
    let id = request.exec_id.clone();
    if id.is_empty() {
        return Err(ContainerError::Invalid {
            field: "exec_id",
            reason: "missing".to_owned(),
        });
    }
    let slot = {
        let mut slots = container.execs.lock();
        match slots.get(&id) {
            Some(slot) => slot.clone(),
            None if slots.len() >= MAX_EXECS => {
                return Err(ContainerError::Limit {
                    what: "execs of a container",
                    limit: MAX_EXECS,
                });
            }
            None => {
                let slot = begin(context, container, request);
                slots.insert(id.clone(), slot.clone());
                slot
            }
        }
    };
    match slot.await {
        Ok(process) => Ok(process),
        Err(error) => {
            // A failed exec is forgotten, so that it can be retried.
            let mut slots = container.execs.lock();
            if slots
                .get(&id)
                .and_then(Shared::peek)
                .is_some_and(Result::is_err)
            {
                slots.remove(&id);
            }
            Err(error.into())
        }
    }
}

fn begin(context: &Arc<PodContext>, container: &Arc<Container>, request: ExecRequest) -> Slot {
    let task = {
        let (context, container) = (Arc::clone(context), Arc::clone(container));
        async move { make(&context, &container, request).await.map_err(Arc::new) }
    };
    let task = context.launcher.tasks.spawn(task);
    let slot = async move {
        match task.await {
            Ok(result) => result,
            Err(error) => Err(Arc::new(ContainerError::Step {
                step: "exec task panicked",
                source: io::Error::other(error),
            })),
        }
    }
    .boxed()
    .shared();
    // The result must be awaited even if all callers have left.
    context.launcher.tasks.spawn(slot.clone().map(drop));
    slot
}

async fn make(
    context: &Arc<PodContext>,
    container: &Arc<Container>,
    request: ExecRequest,
) -> Result<Arc<Process>, ContainerError> {
    if container.state() != ContainerState::Running {
        return Err(container.wrong_state("exec"));
    }
    let plan = spec::exec_plan(&request.process_json, request.terminal, &container.base)?;
    let number = container.execs.next_number();
    let cgroup = container.cgroup.child(&format!("x{number}"));
    cgroup.create()?;
    let result = launch(&context.launcher, container, &request, plan, &cgroup).await;
    let (process, sources, exit) = match result {
        Ok(launched) => launched,
        Err(error) => {
            let cgroup = cgroup.clone();
            let _ = blocking(move || Ok(cgroup.remove()?)).await;
            return Err(error);
        }
    };
    let following = supervise(Arc::clone(&process), sources, exit, {
        let (container, context, process) = (
            Arc::clone(container),
            Arc::clone(context),
            Arc::clone(&process),
        );
        async move |exit| {
            if let Some(watch) = &container.watch {
                // The exit is reported once the host has mirrored the mounts of the command.
                watch.sync_and_wait().await;
            }
            ended(&container, &context, &request.exec_id, &process, exit);
        }
    });
    context.launcher.tasks.spawn(following);
    Ok(process)
}

type Launched = (
    Arc<Process>,
    Vec<(
        boxlite_proto::boxlite::v1::OutputStream,
        crate::descriptor::AsyncDescriptor,
    )>,
    tokio::sync::oneshot::Receiver<RawExit>,
);

/// Creates the process and lets it execute its program.
async fn launch(
    launcher: &Launcher,
    container: &Container,
    request: &ExecRequest,
    plan: ProcessPlan,
    cgroup: &cgroup::Cgroup,
) -> Result<Launched, ContainerError> {
    let failed = || ContainerError::step("failed to set up standard streams");
    let uid = plan.user.uid;
    let body = Plan {
        cgroup_procs: cgroup.path().join("cgroup.procs"),
        user_namespace: container.user_namespace.is_some(),
        process: plan,
    };
    let body = Request::Exec(Box::new(body));
    let pipes = if request.terminal {
        None
    } else {
        Some(Pipes::new(request.stdin).map_err(failed())?)
    };
    if let (Some(pipes), Some(namespace)) = (&pipes, &container.user_namespace) {
        // The process cannot open pipes owned by a user that its namespace does not map.
        pipes.give_to(namespace.outside(uid));
    }
    let mut descriptors = vec![container.pidfd.as_fd()];
    if let Some(pipes) = &pipes {
        descriptors.extend(pipes.process_ends());
    }
    let reply = launcher.spawner.request(&body, &descriptors)?;
    let (pid, exit, _) = launcher.receive(&reply).await?;
    reply.release()?;
    let console = until_exec(&reply).await?;
    let ends = match (pipes, console) {
        (Some(pipes), _) => pipes.into_agent_ends(true),
        (None, Some(master)) => terminal_ends(master, request.stdin, true),
        (None, None) => Err(io::Error::other("the process sent no terminal")),
    };
    let ends = match ends {
        Ok(ends) => ends,
        Err(error) => {
            let _ = cgroup.kill();
            return Err(failed()(error));
        }
    };
    let process = Arc::new(Process::new(pid, ends.input, ends.terminal, cgroup.clone()));
    Ok((process, ends.sources, exit))
}

/// Publishes the exit of the process. Its children keep running, as a daemon started by an exec would.
fn ended(container: &Container, context: &PodContext, id: &str, process: &Process, exit: RawExit) {
    let kills = cgroup::stats::oom_kills(&container.cgroup);
    container.emit_oom(context, kills);
    // OOM kills are counted per container, so a SIGKILL in a container that had one is attributed to it.
    let oom_killed = exit.signal == libc::SIGKILL.unsigned_abs() && kills > 0;
    let exit = Exit {
        code: exit.code,
        signal: exit.signal,
        oom_killed,
        finished_at_unix_ns: exit.at_unix_ns,
    };
    process.set_exit(exit);
    context.events.add(&container.id, id, Event::Exit(exit));
}

/// Forgets an exec that ended. Succeeds if it does not exist.
///
/// # Errors
/// If it is still running.
pub(crate) async fn delete(container: &Container, id: &str) -> Result<(), ContainerError> {
    let process = match container.execs.get(id).await {
        Ok(process) => process,
        // Deleted before, or never created.
        Err(_) => {
            container.execs.lock().remove(id);
            return Ok(());
        }
    };
    if process.exit().is_none() {
        return Err(container.wrong_state("delete a running exec"));
    }
    container.execs.lock().remove(id);
    if process.cgroup.is_empty() {
        let cgroup = process.cgroup.clone();
        let _ = blocking(move || Ok(cgroup.remove()?)).await;
    }
    Ok(())
}
