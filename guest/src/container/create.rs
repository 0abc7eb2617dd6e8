//! Makes a container from a request: root file system, cgroup, streams, init process; each step undone when a later one
//! fails.

use super::pod::Pod;
use super::spec::{self, PidNamespace, Place};
use super::userns::{self, UserNamespace};
use super::{Container, ContainerError, exec};
use crate::agent::Agent;
use crate::boot::reaper::RawExit;
use crate::cgroup::{self, Cgroup, resources};
use crate::execution::stdio::{AgentEnds, Pipes, terminal_ends};
use crate::execution::{Process, supervise};
use crate::shown::table::{Wanted, take_wanted};
use crate::shown::watch::Watch;
use crate::spawner::wire::{Confinement, CreateRequest, Failure, FailureKind, Message, Request};
use crate::spawner::{Reply, SpawnError, resolve_user};
use crate::storage::rootfs::{Owners, Rootfs};
use crate::system;
use boxlite_proto::boxlite::v1::{
    ContainerInitRequest, Exit, OomEvent, PidMode, container_event::Event,
};
use boxlite_sys::sync::Mutex;
use oci_spec::runtime::Spec;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Where libcontainer keeps its state.
const STATE: &str = "/run/boxlite/oci";

/// Carries a whole Init out. Not to be dropped half-way: run it in a task of its own.
pub async fn create(
    agent: Arc<Agent>,
    pod: Arc<Pod>,
    request: ContainerInitRequest,
) -> Result<Arc<Container>, ContainerError> {
    let parsed = spec::parse(&request.spec_json)?;
    let user_namespace = match userns::wanted(&parsed)? {
        Some(map) => Some(pod.user_namespace(&agent, map).await?),
        None => None,
    };
    let pid_namespace = pid_namespace(&agent, &pod, &request, user_namespace.as_ref()).await?;
    let cgroup = Cgroup::pod().child(&request.container_id);
    let request = Arc::new(request);
    let prepared = blocking({
        let (pod, request, cgroup) = (Arc::clone(&pod), Arc::clone(&request), cgroup.clone());
        let joined = Joined {
            pid: pid_namespace,
            user: user_namespace,
        };
        move || prepare(&pod, &request, parsed, joined, &cgroup)
    })
    .await?;
    let result = make_process(&agent, &pod, &request, &cgroup, &prepared).await;
    match result {
        Ok(made) => Ok(assemble(&agent, &pod, &request, cgroup, prepared, made)),
        Err(error) => {
            let undone = blocking(move || {
                undo(&pod, &cgroup, &prepared.rootfs, &prepared.state);
                Ok(())
            });
            let _ = undone.await;
            Err(error)
        }
    }
}

/// Runs what blocks in the kernel on a thread for that.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ContainerError> + Send + 'static,
) -> Result<T, ContainerError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ContainerError::Step {
            step: "blocking work",
            source: io::Error::other(error),
        }),
    }
}

/// The PID namespace.
async fn pid_namespace(
    agent: &Arc<Agent>,
    pod: &Arc<Pod>,
    request: &ContainerInitRequest,
    user_namespace: Option<&UserNamespace>,
) -> Result<PidNamespace, ContainerError> {
    let pid = match request.pid_mode() {
        PidMode::Container => return Ok(PidNamespace::Own),
        PidMode::Node => return Ok(PidNamespace::Vm),
        PidMode::Pod => {
            let map = user_namespace.map(|namespace| namespace.map);
            pod.pause_pid(agent, map).await?
        }
        PidMode::Target => {
            let target = pod.get(&request.pid_target).await?;
            if target.init.exit().is_some() {
                return Err(target.wrong_state("share its PID namespace"));
            }
            target.init.pid
        }
    };
    Ok(PidNamespace::Joined(PathBuf::from(format!(
        "/proc/{pid}/ns/pid"
    ))))
}

/// Namespaces that are not the container's alone.
struct Joined {
    pid: PidNamespace,
    user: Option<UserNamespace>,
}

/// What is ready before there is a process.
struct Prepared {
    rootfs: Rootfs,
    state: PathBuf,
    spec: Spec,
    uid: u32,
    confinement: Confinement,
    user_namespace: Option<UserNamespace>,
    /// Volumes with propagation Bidirectional.
    shown: Vec<Wanted>,
}

/// Root file system, user, cgroup with its limits, `config.json`.
fn prepare(
    pod: &Pod,
    request: &ContainerInitRequest,
    mut spec: Spec,
    joined: Joined,
    cgroup: &Cgroup,
) -> Result<Prepared, ContainerError> {
    let tree = request
        .rootfs
        .as_ref()
        .ok_or_else(|| ContainerError::Invalid {
            field: "rootfs",
            reason: "is missing".to_owned(),
        })?;
    let owners = joined.user.as_ref().map(|namespace| Owners {
        namespace: namespace.file.as_fd(),
        root: namespace.map.first,
    });
    let shown = take_wanted(&mut spec);
    let mut rootfs = Rootfs::assemble(&request.container_id, tree, &pod.layers, owners.as_ref())?;
    let volumes = rootfs.mount_volumes(&mut spec, &pod.layers);
    let outside = |id| joined.user.as_ref().map_or(id, |user| user.outside(id));
    let (id, wanted) = (&request.container_id, &request.block_devices);
    let blocks = rootfs.make_blocks(id, wanted, outside, &mut spec);
    let state = Path::new(STATE).join(&request.container_id);
    let configure = || -> Result<(u32, Confinement), ContainerError> {
        volumes?;
        blocks?;
        let user = resolve_user(&rootfs.path(), &spec::user_plan(&spec))?;
        let place = Place {
            rootfs: &rootfs.path(),
            read_only: tree.read_only,
            cgroup: cgroup.relative(),
            pid_namespace: joined.pid,
            user_namespace: joined.user.as_ref().map(UserNamespace::path),
            terminal: request.terminal,
            user: &user,
            mqueue: Path::new("/proc/sys/fs/mqueue").exists(),
        };
        crate::storage::visit_volumes(&spec);
        let extracted = spec::adapt(&mut spec, &place)?;
        if let Some(process) = spec.process() {
            // Other runtimes make a missing working directory, and images rely on it.
            let _ = crate::storage::rootfs::make_directory(&rootfs.path(), process.cwd());
        }
        cgroup.create()?;
        if let Some(limits) = &extracted.resources {
            resources::apply(cgroup, limits)?;
            let own = spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.devices().as_deref());
            let rules = limits.devices().as_deref().unwrap_or_default();
            cgroup.limit_devices(rules, own.unwrap_or_default())?;
        }
        for (name, value) in &extracted.sysctls {
            system::set_sysctl(name, value)?;
        }
        std::fs::create_dir_all(STATE).map_err(ContainerError::step("state directory"))?;
        let text = serde_json::to_vec(&spec)
            .map_err(|error| ContainerError::step("spec")(error.into()))?;
        std::fs::write(rootfs.bundle().join("config.json"), text)
            .map_err(ContainerError::step("write config.json"))?;
        Ok((user.uid, extracted.confinement))
    };
    match configure() {
        Ok((uid, confinement)) => Ok(Prepared {
            rootfs,
            state,
            spec,
            uid,
            confinement,
            user_namespace: joined.user,
            shown,
        }),
        Err(error) => {
            undo(pod, cgroup, &rootfs, &state);
            Err(error)
        }
    }
}

/// Takes everything down that [`prepare`] and libcontainer made. Blocks.
pub fn undo(pod: &Pod, cgroup: &Cgroup, rootfs: &Rootfs, state: &Path) {
    if let Err(error) = cgroup.remove() {
        tracing::warn!(error = boxlite_sys::report::report(&error), "remove cgroup");
    }
    if let Err(error) = rootfs.take_down(&pod.layers) {
        tracing::warn!(
            error = boxlite_sys::report::report(&error),
            "take down root file system"
        );
    }
    match std::fs::remove_dir_all(state) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "remove state")
        }
        _ => {}
    }
}

/// An init process that waits for its start.
struct Made {
    pid: i32,
    pidfd: OwnedFd,
    ends: AgentEnds,
    reply: Reply,
    exit: tokio::sync::oneshot::Receiver<RawExit>,
}

async fn make_process(
    agent: &Agent,
    _pod: &Pod,
    request: &ContainerInitRequest,
    cgroup: &Cgroup,
    prepared: &Prepared,
) -> Result<Made, ContainerError> {
    let create = Request::Create(Box::new(CreateRequest {
        id: request.container_id.clone(),
        bundle: prepared.rootfs.bundle().to_path_buf(),
        state: PathBuf::from(STATE),
        terminal: request.terminal,
        confinement: prepared.confinement.clone(),
    }));
    let failed = ContainerError::step("standard input and output");
    let (reply, pipes) = if request.terminal {
        (agent.spawner.request(&create, &[])?, None)
    } else {
        let pipes = Pipes::new(request.stdin).map_err(failed)?;
        let namespace = prepared.user_namespace.as_ref();
        pipes.give_to(namespace.map_or(prepared.uid, |namespace| namespace.outside(prepared.uid)));
        (
            agent.spawner.request(&create, &pipes.process_ends())?,
            Some(pipes),
        )
    };
    let result = receive(agent, &reply).await;
    let (pid, exit, console) = match result {
        Ok(made) => made,
        Err(error) => {
            // Whatever was made of it is in the cgroup.
            let _ = cgroup.kill();
            return Err(error);
        }
    };
    let broken = ContainerError::step("standard input and output");
    let ends = match (pipes, console) {
        (Some(pipes), _) => pipes.into_agent_ends(request.stdin_once),
        (None, Some(master)) => terminal_ends(master, request.stdin, request.stdin_once),
        (None, None) => Err(io::Error::other("no terminal was handed over")),
    };
    let pidfd = Pid::from_raw(pid)
        .ok_or(io::Error::from(io::ErrorKind::InvalidData))
        .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
    match (ends, pidfd) {
        (Ok(ends), Ok(pidfd)) => Ok(Made {
            pid,
            pidfd,
            ends,
            reply,
            exit,
        }),
        (Err(error), _) | (_, Err(error)) => {
            let _ = cgroup.kill();
            Err(broken(error))
        }
    }
}

/// A new process's pid, its registered exit, and its terminal's master.
pub type Received = (
    i32,
    tokio::sync::oneshot::Receiver<RawExit>,
    Option<OwnedFd>,
);

/// Follows the helper until the process exists.
pub async fn receive(agent: &Agent, reply: &Reply) -> Result<Received, ContainerError> {
    let mut console = None;
    let mut detail = None;
    loop {
        match reply.next().await? {
            Some((Message::Created { pid }, _)) => {
                return Ok((pid, agent.reaper.register(pid), console));
            }
            Some((Message::Console, master)) => console = master,
            // The first is the innermost: the system call that failed.
            Some((Message::Detail(text), _)) => detail = detail.or(Some(text)),
            Some((Message::Failed(mut failure), _)) => {
                if let Some(detail) = detail.filter(|_| failure.kind == FailureKind::Internal) {
                    failure.message = format!("{}: {detail}", failure.message);
                }
                return Err(SpawnError::Refused(failure).into());
            }
            None => return Err(SpawnError::Silent.into()),
        }
    }
}

/// Waits until the process has executed its program, which closes its end. Answers the terminal's master if it came.
pub async fn until_exec(reply: &Reply) -> Result<Option<OwnedFd>, SpawnError> {
    let mut console = None;
    loop {
        match reply.next().await? {
            None => return Ok(console),
            Some((Message::Console, master)) => console = master,
            Some((Message::Detail(_), _)) => {}
            Some((Message::Failed(failure), _)) => return Err(SpawnError::Refused(failure)),
            Some((Message::Created { .. }, _)) => {
                let failure = Failure::new(FailureKind::Internal, "a process was made twice");
                return Err(SpawnError::Refused(failure));
            }
        }
    }
}

/// Puts the container together and starts following its init process.
fn assemble(
    agent: &Arc<Agent>,
    pod: &Arc<Pod>,
    request: &ContainerInitRequest,
    cgroup: Cgroup,
    prepared: Prepared,
    made: Made,
) -> Arc<Container> {
    let AgentEnds {
        input,
        sources,
        terminal,
    } = made.ends;
    let init = Arc::new(Process::new(made.pid, input, terminal, cgroup.clone()));
    let base =
        spec::process_plan(&prepared.spec, &prepared.confinement).unwrap_or_else(exec::empty_plan);
    if base.console_size != (0, 0)
        && let Some(terminal) = &init.terminal
    {
        let _ = crate::spawner::set_terminal_size(
            terminal.get(),
            base.console_size.0,
            base.console_size.1,
        );
    }
    // Of a process that lives, or is not reaped yet; without it only the order of its end is lost.
    let mounts = std::fs::File::open(format!("/proc/{}/ns/mnt", made.pid)).ok();
    let container = Arc::new(Container {
        id: request.container_id.clone(),
        mounts: Mutex::new(mounts),
        init: Arc::clone(&init),
        cgroup,
        pidfd: made.pidfd,
        rootfs: prepared.rootfs,
        user_namespace: prepared.user_namespace,
        base,
        state: prepared.state,
        reply: tokio::sync::Mutex::new(Some(made.reply)),
        started: AtomicBool::new(false),
        paused: AtomicBool::new(false),
        execs: exec::Execs::default(),
        usage: Default::default(),
        oom_told: AtomicU64::new(0),
        watch: watch(agent, pod, &init, &request.container_id, prepared.shown),
    });
    if crate::storage::follows_host(&prepared.spec) {
        let process = Arc::clone(&init);
        // Ends within a second of the container; the VM's end waits for nobody.
        tokio::task::spawn_blocking(move || {
            crate::storage::pins::follow(process.pid, || process.exit().is_some());
        });
    }
    let following = supervise(init, sources, made.exit, {
        let (container, pod) = (Arc::clone(&container), Arc::clone(pod));
        async move |exit| init_ended(&container, &pod, exit).await
    });
    agent.tasks.spawn(following);
    agent
        .tasks
        .spawn(super::oom::watch(Arc::clone(&container), Arc::clone(pod)));
    container
}

/// Watches the mounts of a container that has Bidirectional volumes.
fn watch(
    agent: &Agent,
    pod: &Pod,
    init: &Arc<Process>,
    id: &str,
    wanted: Vec<Wanted>,
) -> Option<Arc<Watch>> {
    if wanted.is_empty() {
        return None;
    }
    match Watch::begin(id, init.pid, wanted, Arc::clone(&pod.shown)) {
        Ok(watch) => {
            let watch = Arc::new(watch);
            let (watching, init) = (Arc::clone(&watch), Arc::clone(init));
            agent.tasks.spawn(async move { watching.run(&init).await });
            Some(watch)
        }
        Err(error) => {
            // It has ended already, or will be seen to.
            tracing::warn!(container = id, %error, "mounts are not watched");
            None
        }
    }
}

/// The init process ended: what else is in the container goes, and its exit becomes known.
async fn init_ended(container: &Arc<Container>, pod: &Pod, exit: RawExit) {
    // In its own PID namespace the kernel has killed them already; in a shared one they would stay.
    if let Err(error) = container.cgroup.kill() {
        tracing::warn!(
            error = boxlite_sys::report::report(&error),
            "kill container"
        );
    }
    let kills = cgroup::stats::oom_kills(&container.cgroup);
    container.tell_oom(pod, kills);
    let exit = Exit {
        code: exit.code,
        signal: exit.signal,
        oom_killed: kills > 0,
        finished_at_unix_ns: exit.at_unix_ns,
    };
    container.init.set_exit(exit);
    pod.events.add(&container.id, "", Event::Exit(exit));
}

impl Container {
    /// Adds an event when there were more OOM kills than told before.
    pub fn tell_oom(&self, pod: &Pod, kills: u64) {
        if self.oom_told.fetch_max(kills, Ordering::AcqRel) < kills {
            pod.events
                .add(&self.id, "", Event::Oom(OomEvent { count: kills }));
        }
    }

    /// Takes the container down; its processes are killed. Blocks.
    pub fn take_down(&self, pod: &Pod) {
        // First its last processes, then what they asked of the share, then the mounts they saw.
        if let Err(error) = self.cgroup.remove() {
            tracing::warn!(error = boxlite_sys::report::report(&error), "remove cgroup");
        }
        crate::storage::settle_share();
        drop(self.mounts.lock().take());
        undo(pod, &self.cgroup, &self.rootfs, &self.state);
    }
}
