//! The daemon: one per pod, from the word `ok` to the end of its VM. Owns the runtime, the sockets and every task.
//!
//! Prepares the process while it is still single-threaded (session, mount namespace, limits), then serves. It outlives
//! boxlite-cri and containerd; it ends when it is told to. SIGTERM is ignored, as other shims do: a node that shuts its
//! services down must not kill its pods on the way. SIGINT and SIGPIPE are ignored too; a panic ends the process, and the
//! kernel then ends the VM.

use crate::connections::Connections;
use crate::events::{Publisher, Way};
use crate::machine::VmMachine;
use crate::mount_export::host_mounter::{self, HostMounts};
use crate::pod::Context;
use crate::record::Record;
use crate::sandbox::Sandbox;
use crate::sandbox::options::Origin;
use crate::service::Service;
use boxlite_sys::process::ProcessId;
use boxlite_sys::report::Report;
use containerd_shim::Flags;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::Server;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Threads of the runtime. The shim moves little besides logs; the VM has threads of its own.
const WORKERS: usize = 2;
/// After the answer to Shutdown: how long a containerd may take to close its connections. It does so when it has read the
/// answer; a loaded node is slow.
const CLIENTS_LIMIT: Duration = Duration::from_secs(3);
/// After that: how long the server may take to send what is left and end its connections.
const SERVER_LIMIT: Duration = Duration::from_secs(2);
/// How long tasks may take to end after everything was told to.
const TASKS_LIMIT: Duration = Duration::from_secs(5);
/// How long the pod's cgroup may hold dying processes.
const CGROUP_LIMIT: Duration = Duration::from_secs(5);
/// Kept from the OOM killer as containerd keeps its shims.
const OOM_SCORE: &str = "-998";

/// Why the daemon could not serve.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A step of its preparation.
    #[error("{step}")]
    Step {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The ttrpc server.
    #[error("ttrpc server")]
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

/// Serves until told to end. Says `ok` or what is wrong on standard output, once.
///
/// # Errors
/// Any step before `ok`.
pub fn serve(flags: &Flags) -> Result<(), DaemonError> {
    let result = prepare(flags).and_then(|prepared| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .enable_all()
            .thread_name("shim")
            .build()
            .map_err(DaemonError::step("start the runtime"))?
            .block_on(run(prepared))
    });
    if let Err(error) = &result {
        // Whoever reads is `start`; without one the words are in the log by the caller.
        drop(writeln!(std::io::stdout(), "{}", Report(error)));
    }
    result
}

struct Prepared {
    listener: UnixListener,
    bundle: PathBuf,
    id: String,
    namespace: String,
    socket: PathBuf,
    events: Way,
    mounts: HostMounts,
}

/// What must be done before there are threads.
fn prepare(flags: &Flags) -> Result<Prepared, DaemonError> {
    let level = if flags.debug { "debug" } else { "info" };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
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
            "take the listening socket from standard input",
        ))?;
    let listener = UnixListener::from(listener);
    listener
        .local_addr()
        .map_err(DaemonError::step("use standard input as listening socket"))?;
    let null = std::fs::File::open("/dev/null").map_err(DaemonError::step("open /dev/null"))?;
    nix::unistd::dup2_stdin(&null).map_err(DaemonError::step("close standard input"))?;

    // A session of its own: no terminal's signals. Fails only where it leads a process group already.
    if let Err(error) = nix::unistd::setsid() {
        tracing::debug!(%error, "no session of its own");
    }
    let mounts = crate::machine::enter_mount_namespace()
        .map_err(DaemonError::step("make a mount namespace"))?;
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE) {
        tracing::debug!(%error, "oom_score_adj stays");
    }
    let bundle = std::env::current_dir().map_err(DaemonError::step("find the bundle"))?;
    Ok(Prepared {
        listener,
        bundle,
        id: flags.id.clone(),
        namespace: flags.namespace.clone(),
        socket: PathBuf::from(&flags.socket),
        events: Way::new(
            &std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
            &flags.publish_binary,
            &flags.address,
        ),
        mounts,
    })
}

/// A panic anywhere leaves a state nobody knows: the process ends, and with it the VM.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        std::process::abort();
    }));
}

async fn run(prepared: Prepared) -> Result<(), DaemonError> {
    let tasks = TaskTracker::new();
    let exit = CancellationToken::new();
    let published = CancellationToken::new();
    let (publisher, deliver) =
        Publisher::new(prepared.events, &prepared.namespace, published.clone());
    tasks.spawn(deliver);
    let context = Context {
        id: prepared.id.as_str().into(),
        bundle: Arc::new(prepared.bundle.clone()),
        publisher,
        tasks: tasks.clone(),
        host_pid: Arc::default(),
        host_ipc: Arc::default(),
    };
    let record = Record {
        shim: ProcessId::of(std::process::id().cast_signed()),
        socket: prepared.socket.clone(),
        shown: host_mounter::name(&prepared.id),
        ..Record::default()
    };
    let machine = Arc::new(VmMachine::new(record, prepared.mounts));
    machine
        .store(&prepared.bundle)
        .map_err(DaemonError::step("write the shim's record"))?;
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
    say_ok().map_err(DaemonError::step("say ok"))?;
    tracing::info!(id = prepared.id, socket = %prepared.socket.display(), "serving");

    exit.cancelled().await;
    // From here on a connect must fail, or a client would wait for a shim that is going.
    drop(std::fs::remove_file(&prepared.socket));
    // boxlite-cri keeps its connection until this process is gone, and takes its end for the answer.
    let origin = sandbox.snapshot().plan.map(|plan| plan.origin);
    if matches!(origin, Some(Origin::Task | Origin::Sandboxer))
        && !connections.left_by_clients(CLIENTS_LIMIT).await
    {
        tracing::debug!("a client keeps its connection");
    }
    if tokio::time::timeout(SERVER_LIMIT, server.shutdown())
        .await
        .is_err()
    {
        tracing::debug!("connections cut");
    }
    published.cancel();
    tasks.close();
    if tokio::time::timeout(TASKS_LIMIT, tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!(left = tasks.len(), "tasks did not end in time");
    }
    machine.leave_cgroup(CGROUP_LIMIT);
    Record::remove(&prepared.bundle);
    tracing::info!(id = prepared.id, "ended");
    Ok(())
}

/// Swallows what would end a process by default. The task ends with the daemon.
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
                        Some(()) => tracing::info!(signal = kind.as_raw_value(), "ignored: Shutdown ends a shim"),
                        None => return,
                    },
                    () = exit.cancelled() => return,
                }
            }
        });
    }
    Ok(())
}

/// Tells `start` that calls are taken, and lets its pipe go: standard output is the log from now on.
fn say_ok() -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(b"ok\n")?;
    stdout.flush()?;
    nix::unistd::dup2_stdout(std::io::stderr())?;
    Ok(())
}
