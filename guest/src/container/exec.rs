//! Further processes in a container.

use super::create::{receive, until_exec};
use super::pod::Pod;
use super::{Container, ContainerError, spec};
use crate::agent::Agent;
use crate::boot::reaper::RawExit;
use crate::cgroup;
use crate::execution::stdio::{Pipes, terminal_ends};
use crate::execution::{Process, supervise};
use crate::spawner::wire::{Confinement, ExecRequest as Plan, ProcessPlan, Request, UserPlan};
use boxlite_proto::boxlite::v1::{ContainerState, ExecRequest, Exit, container_event::Event};
use boxlite_sys::sync::Mutex;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};

/// Execs of a container that are not deleted yet, ended or not.
const EXEC_LIMIT: usize = 512;

/// A process being made, or made; every caller with its id gets the same.
type Slot = Shared<BoxFuture<'static, Result<Arc<Process>, Arc<ContainerError>>>>;

/// The execs of a container, by id.
#[derive(Debug, Default)]
pub struct Execs {
    slots: Mutex<HashMap<String, Slot>>,
    /// Numbers the cgroups.
    next: AtomicU64,
}

impl Execs {
    /// The process with that id, waiting while it is being made.
    pub async fn get(&self, id: &str) -> Result<Arc<Process>, ContainerError> {
        let slot = self.lock().get(id).cloned();
        match slot {
            Some(slot) => Ok(slot.await?),
            None => Err(ContainerError::NotFound {
                what: "exec",
                id: id.to_owned(),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock()
    }
}

/// Starts the process of the request, or answers the one with its id.
///
/// Dropping the future leaves the process being made; a repeated call gets it.
pub async fn exec(
    agent: &Arc<Agent>,
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    request: ExecRequest,
) -> Result<Arc<Process>, ContainerError> {
    let id = request.exec_id.clone();
    if id.is_empty() {
        return Err(ContainerError::Invalid {
            field: "exec_id",
            reason: "is missing".to_owned(),
        });
    }
    let slot = {
        let mut slots = container.execs.lock();
        match slots.get(&id) {
            Some(slot) => slot.clone(),
            None if slots.len() >= EXEC_LIMIT => {
                return Err(ContainerError::Limit {
                    what: "execs of one container",
                    limit: EXEC_LIMIT,
                });
            }
            None => {
                let slot = begin(agent, pod, container, request);
                slots.insert(id.clone(), slot.clone());
                slot
            }
        }
    };
    match slot.await {
        Ok(process) => Ok(process),
        Err(error) => {
            // A failed one is forgotten, so that it can be tried again.
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

fn begin(
    agent: &Arc<Agent>,
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    request: ExecRequest,
) -> Slot {
    let task = {
        let (agent, pod, container) = (Arc::clone(agent), Arc::clone(pod), Arc::clone(container));
        async move {
            make(&agent, &pod, &container, request)
                .await
                .map_err(Arc::new)
        }
    };
    let task = agent.tasks.spawn(task);
    let slot = async move {
        match task.await {
            Ok(result) => result,
            Err(error) => Err(Arc::new(ContainerError::Step {
                step: "exec",
                source: io::Error::other(error),
            })),
        }
    }
    .boxed()
    .shared();
    // Somebody must take the result even when all callers have gone.
    agent.tasks.spawn(slot.clone().map(drop));
    slot
}

async fn make(
    agent: &Arc<Agent>,
    pod: &Arc<Pod>,
    container: &Arc<Container>,
    request: ExecRequest,
) -> Result<Arc<Process>, ContainerError> {
    if container.state() != ContainerState::Running {
        return Err(container.wrong_state("exec"));
    }
    let plan = spec::exec_plan(&request.process_json, request.terminal, &container.base)?;
    let number = container.execs.next.fetch_add(1, Ordering::Relaxed);
    let cgroup = container.cgroup.child(&format!("x{number}"));
    cgroup.create()?;
    let result = launch(agent, container, &request, plan, &cgroup).await;
    let (process, sources, exit) = match result {
        Ok(launched) => launched,
        Err(error) => {
            let cgroup = cgroup.clone();
            let _ = super::create::blocking(move || Ok(cgroup.remove()?)).await;
            return Err(error);
        }
    };
    let following = supervise(Arc::clone(&process), sources, exit, {
        let (container, pod, process) =
            (Arc::clone(container), Arc::clone(pod), Arc::clone(&process));
        async move |exit| {
            if let Some(watch) = &container.watch {
                // What the command mounted is on the host when its end is told.
                watch.settle().await;
            }
            ended(&container, &pod, &request.exec_id, &process, exit);
        }
    });
    agent.tasks.spawn(following);
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

/// Makes the process and lets it run its program.
async fn launch(
    agent: &Arc<Agent>,
    container: &Container,
    request: &ExecRequest,
    plan: ProcessPlan,
    cgroup: &cgroup::Cgroup,
) -> Result<Launched, ContainerError> {
    let failed = || ContainerError::step("standard input and output");
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
        // The process cannot take what a user from outside of its namespace owns.
        pipes.give_to(namespace.outside(uid));
    }
    let mut descriptors = vec![container.pidfd.as_fd()];
    if let Some(pipes) = &pipes {
        descriptors.extend(pipes.process_ends());
    }
    let reply = agent.spawner.request(&body, &descriptors)?;
    let (pid, exit, _) = receive(agent, &reply).await?;
    reply.release()?;
    let console = until_exec(&reply).await?;
    let ends = match (pipes, console) {
        (Some(pipes), _) => pipes.into_agent_ends(true),
        (None, Some(master)) => terminal_ends(master, request.stdin, true),
        (None, None) => Err(io::Error::other("no terminal was handed over")),
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

/// The process ended; what it left behind lives on, as a daemon started by an exec would.
fn ended(container: &Container, pod: &Pod, id: &str, process: &Process, exit: RawExit) {
    let kills = cgroup::stats::oom_kills(&container.cgroup);
    container.tell_oom(pod, kills);
    // Only the container as a whole counts OOM kills, so a SIGKILL in a container that had one is taken for it.
    let oom_killed = exit.signal == libc::SIGKILL.unsigned_abs() && kills > 0;
    let exit = Exit {
        code: exit.code,
        signal: exit.signal,
        oom_killed,
        finished_at_unix_ns: exit.at_unix_ns,
    };
    process.set_exit(exit);
    pod.events.add(&container.id, id, Event::Exit(exit));
}

/// Forgets an exec that ended. Succeeds on what is gone.
///
/// # Errors
/// It still runs.
pub async fn delete(container: &Container, id: &str) -> Result<(), ContainerError> {
    let process = match container.execs.get(id).await {
        Ok(process) => process,
        // Gone, or never made.
        Err(_) => {
            container.execs.lock().remove(id);
            return Ok(());
        }
    };
    if process.exit().is_none() {
        return Err(container.wrong_state("delete an exec that runs"));
    }
    container.execs.lock().remove(id);
    if process.cgroup.is_empty() {
        let cgroup = process.cgroup.clone();
        let _ = super::create::blocking(move || Ok(cgroup.remove()?)).await;
    }
    Ok(())
}

/// The plan of a container whose spec has no process, which [`spec::parse`] refuses.
pub fn empty_plan() -> ProcessPlan {
    ProcessPlan {
        terminal: false,
        console_size: (0, 0),
        args: Vec::new(),
        env: Vec::new(),
        cwd: PathBuf::from("/"),
        user: UserPlan::default(),
        confinement: Confinement {
            no_new_privileges: true,
            ..Confinement::default()
        },
        rlimits: Vec::new(),
        oom_score_adj: 0,
    }
}
