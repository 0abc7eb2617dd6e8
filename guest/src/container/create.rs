//! Creates a container from a request: root filesystem, cgroup, streams, init process. A failed step undoes those
//! before it.

use super::context::PodContext;
use super::error::ContainerError;
use super::execs::Execs;
use super::launcher::{Launcher, blocking};
use super::spec::{self, ContainerFacts, PidNamespace};
use super::teardown::remove_state;
use super::userns::{self, UserNamespace};
use super::{Container, oom};
use crate::boot::reaper::RawExit;
use crate::cgroup::{self, Cgroup, resources};
use crate::execution::stdio::{AgentEnds, Pipes, terminal_ends};
use crate::execution::{Process, supervise};
use crate::mount_export::table::{BidirectionalVolume, take_bidirectional};
use crate::mount_export::watcher::MountWatcher;
use crate::resolv_conf;
use crate::spawner::wire::{Confinement, CreateRequest, Request};
use crate::spawner::{Reply, errno_text, resolve_user};
use crate::steps::Steps;
use crate::storage::rootfs::{Owners, Rootfs};
use crate::storage::{StorageError, mount_points};
use crate::system;
use boxlite_proto::boxlite::v1::{
    ContainerInitRequest, Exit, PidMode, StepKind, container_event::Event,
};
use boxlite_sys::storage_full::is_full;
use boxlite_sys::sync::Mutex;
use nix::errno::Errno;
use oci_spec::runtime::Spec;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

/// Directory of libcontainer's state.
const STATE: &str = "/run/boxlite/oci";

/// Handles an Init request. Must not be dropped before it completes: run it in its own task.
pub(crate) async fn create(
    context: Arc<PodContext>,
    target: Option<Arc<Container>>,
    request: ContainerInitRequest,
) -> Result<Arc<Container>, ContainerError> {
    let begun = Instant::now();
    let parsed = spec::parse(&request.spec_json)?;
    let user_namespace = match userns::requested_mapping(&parsed)? {
        Some(map) => Some(context.user_namespace(map).await?),
        None => None,
    };
    let pid_namespace = pid_namespace(&context, target, &request, user_namespace.as_ref()).await?;
    let cgroup = Cgroup::pod().child(&request.container_id);
    let request = Arc::new(request);
    let preparing = Instant::now();
    let prepared = blocking({
        let (context, request, cgroup) =
            (Arc::clone(&context), Arc::clone(&request), cgroup.clone());
        let joined = SharedNamespaces {
            pid: pid_namespace,
            user: user_namespace,
        };
        move || prepare(&context, &request, parsed, joined, &cgroup)
    })
    .await?;
    let prepared_at = Instant::now();
    let result = make_process(&context.launcher, &request, &cgroup, &prepared).await;
    match result {
        Ok(made) => {
            let now = Instant::now();
            let mut creation = Steps::default();
            creation.add(StepKind::Create, begun, now);
            creation.add(StepKind::Rootfs, preparing, prepared_at);
            creation.add(StepKind::Process, prepared_at, now);
            Ok(assemble(
                &context, &request, cgroup, prepared, made, creation,
            ))
        }
        Err(error) => {
            let removed = blocking(move || {
                remove_state(&context.layers, &cgroup, &prepared.rootfs, &prepared.state);
                Ok(())
            });
            let _ = removed.await;
            Err(error)
        }
    }
}

/// Resolves the PID namespace of the request.
async fn pid_namespace(
    context: &PodContext,
    target: Option<Arc<Container>>,
    request: &ContainerInitRequest,
    user_namespace: Option<&UserNamespace>,
) -> Result<PidNamespace, ContainerError> {
    let pid = match request.pid_mode() {
        PidMode::Container => return Ok(PidNamespace::Own),
        PidMode::Node => return Ok(PidNamespace::Vm),
        PidMode::Pod => {
            let map = user_namespace.map(|namespace| namespace.map);
            context.pause_pid(map).await?
        }
        PidMode::Target => {
            let target = target.ok_or_else(|| ContainerError::NotFound {
                what: "container",
                id: request.pid_target.clone(),
            })?;
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

/// Namespaces shared with other containers.
struct SharedNamespaces {
    pid: PidNamespace,
    user: Option<UserNamespace>,
}

/// Everything that is set up before the process exists.
struct Prepared {
    rootfs: Rootfs,
    state: PathBuf,
    spec: Spec,
    uid: u32,
    confinement: Confinement,
    user_namespace: Option<UserNamespace>,
    /// Volumes with propagation Bidirectional.
    bidirectional: Vec<BidirectionalVolume>,
}

/// Sets up root filesystem, user, cgroup with its limits, and `config.json`.
fn prepare(
    context: &PodContext,
    request: &ContainerInitRequest,
    mut spec: Spec,
    joined: SharedNamespaces,
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
    let bidirectional = take_bidirectional(&mut spec);
    let mut rootfs = Rootfs::assemble(
        &request.container_id,
        tree,
        &context.layers,
        owners.as_ref(),
    )?;
    context.mirrors.replace(&mut spec);
    let volumes = rootfs.mount_volumes(&mut spec, &context.layers, owners.as_ref());
    let outside = |id| joined.user.as_ref().map_or(id, |user| user.outside(id));
    let (id, devices) = (&request.container_id, &request.block_devices);
    let blocks = rootfs.make_blocks(id, devices, outside, &mut spec);
    let state = Path::new(STATE).join(&request.container_id);
    let configure = || -> Result<(u32, Confinement), ContainerError> {
        volumes?;
        blocks?;
        let user = resolve_user(&rootfs.path(), &spec::user_plan(&spec))?;
        let facts = ContainerFacts {
            rootfs: &rootfs.path(),
            read_only: tree.read_only,
            cgroup: cgroup.relative(),
            pid_namespace: joined.pid,
            user_namespace: joined.user.as_ref().map(UserNamespace::path),
            terminal: request.terminal,
            user: &user,
            mqueue: Path::new("/proc/sys/fs/mqueue").exists(),
        };
        resolv_conf::mount(&mut spec, tree.read_only);
        crate::storage::prefault_submounts(&spec);
        let extracted = spec::adapt(&mut spec, &facts)?;
        mount_points::resolve(&rootfs.path(), &mut spec)?;
        rootfs.mount_image_volumes(&mut spec, owners.as_ref())?;
        if let Some(process) = spec.process() {
            mount_points::make_working_directory(&rootfs.path(), &spec, process.cwd())
                .map_err(|error| working_dir_error(process.cwd(), error))?;
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
        std::fs::create_dir_all(STATE)
            .map_err(ContainerError::step("failed to create the state directory"))?;
        let text = serde_json::to_vec(&spec)
            .map_err(|error| ContainerError::step("failed to serialize the spec")(error.into()))?;
        std::fs::write(rootfs.bundle().join("config.json"), text)
            .map_err(ContainerError::step("failed to write config.json"))?;
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
            bidirectional,
        }),
        Err(error) => {
            remove_state(&context.layers, cgroup, &rootfs, &state);
            Err(error)
        }
    }
}

/// Returns the error of a working directory, named as in the CRI unless the disk is full.
fn working_dir_error(path: &Path, error: io::Error) -> ContainerError {
    if is_full(&error) {
        return StorageError::path("create working directory", path)(error).into();
    }
    let reason = error.raw_os_error().map_or_else(
        || error.to_string(),
        |errno| errno_text(Errno::from_raw(errno)),
    );
    ContainerError::Invalid {
        field: "working_dir",
        reason: format!("{}: {reason}", path.display()),
    }
}

fn working_dir(spec: &Spec) -> PathBuf {
    let process = spec.process().as_ref();
    process.map_or_else(PathBuf::new, |process| process.cwd().clone())
}

/// An init process that waits for Start.
struct LaunchedProcess {
    pid: i32,
    pidfd: OwnedFd,
    ends: AgentEnds,
    reply: Reply,
    exit: tokio::sync::oneshot::Receiver<RawExit>,
}

async fn make_process(
    launcher: &Launcher,
    request: &ContainerInitRequest,
    cgroup: &Cgroup,
    prepared: &Prepared,
) -> Result<LaunchedProcess, ContainerError> {
    let create = Request::Create(Box::new(CreateRequest {
        id: request.container_id.clone(),
        bundle: prepared.rootfs.bundle().to_path_buf(),
        state: PathBuf::from(STATE),
        terminal: request.terminal,
        working_dir: working_dir(&prepared.spec),
        confinement: prepared.confinement.clone(),
    }));
    let failed = ContainerError::step("failed to set up standard streams");
    let kills_before = cgroup::stats::oom_kills(&Cgroup::pod());
    let (reply, pipes) = if request.terminal {
        (launcher.spawner.request(&create, &[])?, None)
    } else {
        let pipes = Pipes::new(request.stdin).map_err(failed)?;
        let namespace = prepared.user_namespace.as_ref();
        pipes.give_to(namespace.map_or(prepared.uid, |namespace| namespace.outside(prepared.uid)));
        (
            launcher.spawner.request(&create, &pipes.process_ends())?,
            Some(pipes),
        )
    };
    let (pid, exit, console) = match launcher.receive(&reply).await {
        Ok(made) => made,
        Err(error) => {
            // libcontainer reports only that its process has ended, and has removed the container's cgroup with its
            // counters. The pod's cgroup counts the kills in all its descendants.
            let out_of_memory = cgroup::stats::oom_kills(&Cgroup::pod()) > kills_before;
            // All processes created so far are in the cgroup.
            let _ = cgroup.kill();
            return Err(match out_of_memory {
                true => ContainerError::OutOfMemory,
                false => error,
            });
        }
    };
    let broken = ContainerError::step("failed to set up standard streams");
    let ends = match (pipes, console) {
        (Some(pipes), _) => pipes.into_agent_ends(request.stdin_once),
        (None, Some(master)) => terminal_ends(master, request.stdin, request.stdin_once),
        (None, None) => Err(io::Error::other("the process sent no terminal")),
    };
    let pidfd = Pid::from_raw(pid)
        .ok_or(io::Error::from(io::ErrorKind::InvalidData))
        .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
    match (ends, pidfd) {
        (Ok(ends), Ok(pidfd)) => Ok(LaunchedProcess {
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

/// Builds the container and starts following its init process.
fn assemble(
    context: &Arc<PodContext>,
    request: &ContainerInitRequest,
    cgroup: Cgroup,
    prepared: Prepared,
    made: LaunchedProcess,
    creation: Steps,
) -> Arc<Container> {
    let AgentEnds {
        input,
        sources,
        terminal,
    } = made.ends;
    let init = Arc::new(Process::new(made.pid, input, terminal, cgroup.clone()));
    let base =
        spec::process_plan(&prepared.spec, &prepared.confinement).unwrap_or_else(spec::empty_plan);
    if base.console_size != (0, 0)
        && let Some(terminal) = &init.terminal
    {
        let _ = crate::spawner::set_terminal_size(
            terminal.get(),
            base.console_size.0,
            base.console_size.1,
        );
    }
    // Fails only if the process was reaped already; then just the order of the teardown is lost.
    let mounts = std::fs::File::open(format!("/proc/{}/ns/mnt", made.pid)).ok();
    let container = Arc::new(Container {
        id: request.container_id.clone(),
        mounts: Mutex::new(mounts),
        init: Arc::clone(&init),
        cgroup,
        pidfd: made.pidfd,
        rootfs: prepared.rootfs,
        user_namespace: prepared.user_namespace,
        creation,
        base,
        state: prepared.state,
        reply: tokio::sync::Mutex::new(Some(made.reply)),
        started: AtomicBool::new(false),
        paused: AtomicBool::new(false),
        execs: Execs::default(),
        usage: Default::default(),
        oom_reported: AtomicU64::new(0),
        watch: watch(
            context,
            &init,
            &request.container_id,
            prepared.bidirectional,
        ),
    });
    if crate::storage::follows_host(&prepared.spec) {
        let process = Arc::clone(&init);
        // Detached: it ends within a second of the container, and the shutdown of the VM does not wait for it.
        tokio::task::spawn_blocking(move || {
            crate::storage::submount_pins::follow(process.pid, || process.exit().is_some());
        });
    }
    let following = supervise(init, sources, made.exit, {
        let (container, context) = (Arc::clone(&container), Arc::clone(context));
        async move |exit| init_ended(&container, &context, exit).await
    });
    let tasks = &context.launcher.tasks;
    tasks.spawn(following);
    tasks.spawn(oom::watch(Arc::clone(&container), Arc::clone(context)));
    container
}

/// Starts the mount watcher of a container that has Bidirectional volumes.
fn watch(
    context: &PodContext,
    init: &Arc<Process>,
    id: &str,
    volumes: Vec<BidirectionalVolume>,
) -> Option<Arc<MountWatcher>> {
    if volumes.is_empty() {
        return None;
    }
    match MountWatcher::new(id, init.pid, volumes, Arc::clone(&context.exports)) {
        Ok(watch) => {
            let watch = Arc::new(watch);
            let (watching, init) = (Arc::clone(&watch), Arc::clone(init));
            context
                .launcher
                .tasks
                .spawn(async move { watching.run(&init).await });
            Some(watch)
        }
        Err(error) => {
            // The process has ended, which its supervision handles.
            tracing::warn!(container = id, %error, "failed to watch the container's mounts");
            None
        }
    }
}

/// Handles the end of the init process: kills the rest of the container and publishes the exit.
async fn init_ended(container: &Arc<Container>, context: &PodContext, exit: RawExit) {
    // The kernel has killed the processes of a private PID namespace already, but not those in a shared one.
    if let Err(error) = container.cgroup.kill() {
        tracing::warn!(
            error = boxlite_sys::report::report(&error),
            "failed to kill the container's processes"
        );
    }
    let kills = cgroup::stats::oom_kills(&container.cgroup);
    container.emit_oom(context, kills);
    let exit = Exit {
        code: exit.code,
        signal: exit.signal,
        oom_killed: kills > 0,
        finished_at_unix_ns: exit.at_unix_ns,
    };
    container.init.set_exit(exit);
    context.events.add(&container.id, "", Event::Exit(exit));
}
