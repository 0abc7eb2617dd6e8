//! The shim daemon: one process per pod, which owns the async runtime, the sockets and all tasks.
//!
//! Prepares the process while it is single-threaded (session, mount namespace, limits), then serves until Shutdown. It
//! outlives boxlite-cri and containerd. Like other shims it ignores SIGTERM, so that stopping a node's services does not
//! kill its pods; it ignores SIGINT and SIGHUP too. A panic aborts the process, and the kernel then kills the VM.

use crate::connections::Connections;
use crate::events::{EventTransport, Publisher};
use crate::flags::Flags;
use crate::logs::shim_log::ShimLog;
use crate::machine::VmMachine;
use crate::mount_export::host_mounter::{self, HostMounts};
use crate::pod::Context;
use crate::sandbox::Sandbox;
use crate::sandbox::options::SandboxOwner;
use crate::service::Service;
use crate::shim_state::ShimState;
use boxlite_proto::vmm::PodName;
use boxlite_sys::process::ProcessId;
use boxlite_sys::report::Report;
use boxlite_telemetry::{ServiceName, Telemetry};
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::Server;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Worker threads of the async runtime. The shim mostly copies logs; the VM runs in another process.
const WORKER_THREADS: usize = 2;
/// Timeout for containerd to close its connections after the response to Shutdown. It does so once it has read the
/// response; a loaded node is slow.
const CLIENT_CLOSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout for the server to send pending responses and close its connections.
const SERVER_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for all tasks to end.
const TASK_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for blocking calls to return at the end of the process.
const BLOCKING_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout for the pod's cgroup to become empty.
const CGROUP_EMPTY_TIMEOUT: Duration = Duration::from_secs(5);
/// OOM score adjustment, as containerd sets it for its shims.
const OOM_SCORE_ADJ: &str = "-998";

/// Errors of the daemon before it serves.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A failed step; `step` begins with a verb.
    #[error("failed to {step}")]
    Step {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The ttrpc server did not start.
    #[error("failed to start the ttrpc server")]
    Server(#[source] ttrpc::Error),
}

impl DaemonError {
    fn step<E: Into<std::io::Error>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Step {
            step,
            source: source.into(),
        }
    }
}

/// Serves until Shutdown. Reports `ok` or an error on standard output, once.
///
/// # Errors
/// A step before `ok` failed.
pub fn serve(flags: &Flags) -> Result<(), DaemonError> {
    let result = prepare(flags).and_then(|prepared| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKER_THREADS)
            .enable_all()
            .thread_name("shim")
            .build()
            .map_err(DaemonError::step("start the runtime"))?;
        let result = runtime.block_on(run(prepared));
        // Dropping the runtime would wait without a limit for blocking calls, such as one on a stalled volume.
        runtime.shutdown_timeout(BLOCKING_SHUTDOWN_TIMEOUT);
        result
    });
    if let Err(error) = &result {
        // Read by `start`. If it is gone, the caller logs the error.
        drop(writeln!(std::io::stdout(), "{}", Report(error)));
    }
    result
}

struct Prepared {
    listener: UnixListener,
    pod: Arc<OnceLock<PodName>>,
    bundle: PathBuf,
    id: String,
    namespace: String,
    socket: PathBuf,
    events: EventTransport,
    mounts: HostMounts,
}

/// Prepares the process while it is single-threaded.
fn prepare(flags: &Flags) -> Result<Prepared, DaemonError> {
    let level = if flags.debug { "debug" } else { "info" };
    let pod = Arc::default();
    let log = ShimLog::of_stderr(
        &format!("{}/{}", flags.namespace, flags.id),
        Arc::clone(&pod),
    )
    .map_err(DaemonError::step("open the log"))?;
    tracing_subscriber::fmt()
        .with_writer(log)
        .with_env_filter(tracing_subscriber::EnvFilter::new(format!(
            "warn,boxlite_shim_v2={level}"
        )))
        .with_ansi(false)
        .init();
    abort_on_panic();

    let listener = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(DaemonError::step(
            "duplicate the listening socket from standard input",
        ))?;
    let listener = UnixListener::from(listener);
    listener
        .local_addr()
        .map_err(DaemonError::step("use standard input as listening socket"))?;
    let null = std::fs::File::open("/dev/null").map_err(DaemonError::step("open /dev/null"))?;
    nix::unistd::dup2_stdin(&null).map_err(DaemonError::step("close standard input"))?;

    // A new session receives no signals from a terminal. Fails only if this process leads a process group already.
    if let Err(error) = nix::unistd::setsid() {
        tracing::debug!(%error, "failed to create a session");
    }
    let mounts = crate::machine::enter_mount_namespace()
        .map_err(DaemonError::step("create a mount namespace"))?;
    // A core dump would contain the pod's output and input.
    boxlite_sys::core_dumps::forbid().map_err(DaemonError::step("forbid core dumps"))?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ) {
        tracing::debug!(%error, "failed to set oom_score_adj");
    }
    let bundle = std::env::current_dir().map_err(DaemonError::step("find the bundle"))?;
    Ok(Prepared {
        listener,
        pod,
        bundle,
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        socket: PathBuf::from(&flags.socket),
        events: EventTransport::new(
            &std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
            &flags.publish_binary,
            &flags.address,
        ),
        mounts,
    })
}

/// Makes a panic in any thread abort the process, and with it the VM, since it leaves an unknown state.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::abort();
    }));
}

async fn run(prepared: Prepared) -> Result<(), DaemonError> {
    let telemetry = Telemetry::start(
        ServiceName::Fixed("containerd-shim-boxlite-v2"),
        env!("CARGO_PKG_VERSION"),
    );
    let tasks = TaskTracker::new();
    let exit = CancellationToken::new();
    let published = CancellationToken::new();
    let (publisher, deliver) =
        Publisher::new(prepared.events, &prepared.namespace, published.clone());
    tasks.spawn(deliver);
    let context = Context {
        id: prepared.id.as_str().into(),
        bundle: Arc::new(prepared.bundle.clone()),
        pod: prepared.pod,
        publisher,
        tasks: tasks.clone(),
        host_pid: Arc::default(),
        host_ipc: Arc::default(),
    };
    let state = ShimState {
        shim: ProcessId::of(std::process::id().cast_signed()),
        socket: prepared.socket.clone(),
        exports: host_mounter::name(&prepared.id),
        ..ShimState::default()
    };
    let machine = Arc::new(VmMachine::new(state, prepared.mounts));
    machine
        .store(&prepared.bundle)
        .map_err(DaemonError::step("write the shim's state file"))?;
    ignore_signals(&tasks, &exit)?;

    let sandbox = Sandbox::spawn(context, machine.clone());
    let service = Service::new(sandbox.clone(), exit.clone());
    let connections = Connections::default();
    let listener = connections
        .listener(prepared.listener)
        .map_err(DaemonError::step("listen"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(service.tables());
    server.start().await.map_err(DaemonError::Server)?;
    report_ready().map_err(DaemonError::step("report readiness"))?;
    tracing::info!(id = prepared.id, socket = %prepared.socket.display(), "shim serving");

    exit.cancelled().await;
    // New connections must fail from now on, or a client would wait for a shim that is about to exit.
    drop(std::fs::remove_file(&prepared.socket));
    // boxlite-cri keeps its connection open until this process exits, and treats the disconnect as the response.
    let owner = sandbox.snapshot().plan.map(|plan| plan.owner);
    if matches!(owner, Some(SandboxOwner::Task | SandboxOwner::Sandboxer))
        && !connections.wait_closed(CLIENT_CLOSE_TIMEOUT).await
    {
        tracing::debug!("a client did not close its connection in time");
    }
    if tokio::time::timeout(SERVER_SHUTDOWN_TIMEOUT, server.shutdown())
        .await
        .is_err()
    {
        tracing::debug!("timed out shutting down the ttrpc server");
    }
    published.cancel();
    tasks.close();
    if tokio::time::timeout(TASK_SHUTDOWN_TIMEOUT, tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!(
            remaining = tasks.len(),
            "timed out waiting for tasks to end"
        );
    }
    machine.leave_cgroup(CGROUP_EMPTY_TIMEOUT);
    if let Some(telemetry) = telemetry {
        telemetry.shutdown().await;
    }
    ShimState::remove(&prepared.bundle);
    tracing::info!(id = prepared.id, "shim exiting");
    Ok(())
}

/// Ignores signals that would end the process. The tasks end with the daemon.
fn ignore_signals(tasks: &TaskTracker, exit: &CancellationToken) -> Result<(), DaemonError> {
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        let mut stream = signal(kind).map_err(DaemonError::step("catch signals"))?;
        let exit = exit.clone();
        tasks.spawn(async move {
            loop {
                tokio::select! {
                    received = stream.recv() => match received {
                        Some(()) => tracing::info!(signal = kind.as_raw_value(), "ignoring signal; use Shutdown to end the shim"),
                        None => return,
                    },
                    () = exit.cancelled() => return,
                }
            }
        });
    }
    Ok(())
}

/// Reports readiness to `start` and closes the pipe: standard output becomes the log.
fn report_ready() -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(b"ok\n")?;
    stdout.flush()?;
    nix::unistd::dup2_stdout(std::io::stderr())?;
    Ok(())
}
