//! [`Supervisor`] starts the vmm child and [`VmmChild`] is the shim's hold on it: wait, kill, last words.
//!
//! The child is this same binary in the role `vmm`, PID 1 of a PID namespace of its own: whatever the VMM started dies
//! with it. It has SIGKILL as parent-death signal; that one fires when the *thread* that forked it ends, so one thread
//! per child forks, waits and does nothing else.
//!
//! The spec goes over a pipe on standard input (never argv); the pipe stays open until the child ends, so a child that
//! finds it closed knows that its shim is gone. Console comes back on standard output, messages on standard error.

use super::console::BoundedLog;
use boxlite_proto::names::CONSOLE_LOG;
use boxlite_proto::vmm::InstanceSpec;
use boxlite_sys::sync::Mutex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::fmt;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::watch;

/// File in the VM's working directory with the vmm child's standard error.
const STDERR_LOG: &str = "vmm.log";

/// Time for the rest of what a dead child wrote to be read. Its pipes have no other writer, so this is milliseconds.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);

/// How a vmm child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmmExit {
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

impl fmt::Display for VmmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.signal.map(Signal::try_from)) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(Ok(signal))) => write!(f, "killed by {signal}"),
            (None, _) => f.write_str("killed by an unknown signal"),
        }
    }
}

/// Why no vmm child came to be.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A system call failed.
    #[error("{step} the vmm child")]
    Step {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The spec cannot be written as JSON.
    #[error("instance spec")]
    Spec(#[source] serde_json::Error),
}

/// Starts vmm children.
#[derive(Debug, Clone)]
pub struct Supervisor {
    program: PathBuf,
}

impl Default for Supervisor {
    fn default() -> Self {
        // Not a path in the file system: the binary may have been replaced by an upgrade meanwhile.
        Self::new(PathBuf::from("/proc/self/exe"))
    }
}

impl Supervisor {
    /// Uses another binary than the running one (tests).
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }

    /// Starts a child for `spec`, whose working directory must exist. Blocks for the time of a fork and exec.
    ///
    /// # Errors
    /// It could not be started. What goes wrong later inside the child shows as its exit.
    pub fn spawn(&self, spec: &InstanceSpec) -> Result<VmmChild, SpawnError> {
        let step = |step| move |source| SpawnError::Step { step, source };
        let mut line = serde_json::to_vec(spec).map_err(SpawnError::Spec)?;
        line.push(b'\n');

        let mut command = Command::new(&self.program);
        // Its own process group: a terminal's ctrl-C is the shim's business. argv[1] is for ps; it is no secret.
        command
            .arg("vmm")
            .arg(&spec.id)
            .env_clear()
            .process_group(0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());

        let (exit_to, exit) = watch::channel(None);
        let (started_to, started) = mpsc::sync_channel(1);
        let shared = Arc::new(Shared::default());
        let hold = Arc::clone(&shared);
        let (console, stderr) = (BoundedLog::default(), BoundedLog::default());
        let logs = [console.clone(), stderr.clone()];
        std::thread::Builder::new()
            .name("vmm-child".to_owned())
            .spawn(move || fork_and_wait(command, &hold, &logs, &started_to, &exit_to))
            .map_err(step("starting a thread for"))?;
        let gone = || std::io::Error::other("its thread ended");
        let mut child = started
            .recv()
            .map_err(|_| step("starting")(gone()))?
            .map_err(step("starting"))?;

        if let Some(from) = child.stdout.take() {
            follow(
                "vmm-console",
                &console,
                from,
                spec.work_dir.join(CONSOLE_LOG),
            )
            .map_err(step("reading"))?;
        }
        if let Some(from) = child.stderr.take() {
            follow("vmm-stderr", &stderr, from, spec.work_dir.join(STDERR_LOG))
                .map_err(step("reading"))?;
        }
        let child = VmmChild {
            shared,
            exit,
            console,
            stderr,
            _spec_pipe: Arc::new(child.stdin.take()),
        };
        if let Some(mut pipe) = child._spec_pipe.as_ref().as_ref() {
            // A child that died at once shows as its exit, with its message; not as a broken pipe here.
            match pipe.write_all(&line) {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    child.kill();
                    return Err(step("writing the spec to")(error));
                }
                _ => {}
            }
        }
        Ok(child)
    }
}

fn follow(
    name: &str,
    log: &BoundedLog,
    from: impl std::io::Read + Send + 'static,
    file: PathBuf,
) -> std::io::Result<()> {
    let log = log.clone();
    // Ends by itself when the child, the last writer, is gone.
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || log.follow(from, Some(file)))?;
    Ok(())
}

#[derive(Default)]
struct Shared {
    /// Set from the fork until just before the child is reaped: nobody else can have the number meanwhile.
    alive: Mutex<Option<Pid>>,
    pid: Mutex<i32>,
}

/// The pipes of a started child.
struct Pipes {
    stdin: Option<std::process::ChildStdin>,
    stdout: Option<std::process::ChildStdout>,
    stderr: Option<std::process::ChildStderr>,
}

fn fork_and_wait(
    mut command: Command,
    shared: &Shared,
    logs: &[BoundedLog],
    started: &mpsc::SyncSender<std::io::Result<Pipes>>,
    exit: &watch::Sender<Option<VmmExit>>,
) {
    // Only children of this thread are born into the new PID namespace.
    let child = unshare(CloneFlags::CLONE_NEWPID)
        .map_err(std::io::Error::from)
        .and_then(|()| command.spawn());
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            drop(started.send(Err(error)));
            return;
        }
    };
    let pid = Pid::from_raw(child.id().cast_signed());
    *shared.alive.lock() = Some(pid);
    *shared.pid.lock() = pid.as_raw();
    let pipes = Pipes {
        stdin: child.stdin.take(),
        stdout: child.stdout.take(),
        stderr: child.stderr.take(),
    };
    drop(started.send(Ok(pipes)));
    let ended = wait_for(&mut child, pid, shared);
    for log in logs {
        log.wait_end(LAST_WORDS_LIMIT);
    }
    exit.send_replace(Some(ended));
}

fn wait_for(child: &mut Child, pid: Pid, shared: &Shared) -> VmmExit {
    // Leave the zombie until no one can signal its number any more.
    while let Err(nix::errno::Errno::EINTR) =
        waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
    {}
    *shared.alive.lock() = None;
    match child.wait() {
        Ok(status) => VmmExit {
            code: status.code(),
            signal: status.signal(),
        },
        // Somebody else reaped it: it has ended, and nobody knows how.
        Err(_) => VmmExit {
            code: None,
            signal: None,
        },
    }
}

/// The shim's hold on a vmm child. Clones are the same child. Dropping all of them closes the spec pipe, nothing else:
/// who gives a VM up calls [`VmmChild::kill`].
#[derive(Clone)]
pub struct VmmChild {
    shared: Arc<Shared>,
    exit: watch::Receiver<Option<VmmExit>>,
    console: BoundedLog,
    stderr: BoundedLog,
    _spec_pipe: Arc<Option<std::process::ChildStdin>>,
}

impl VmmChild {
    /// Process id in the shim's PID namespace, also after its end.
    pub fn pid(&self) -> i32 {
        *self.shared.pid.lock()
    }

    /// Waits until the VM has ended. May be called often and by many; dropping the future changes nothing.
    pub async fn wait(&self) -> VmmExit {
        let mut exit = self.exit.clone();
        let unknown = VmmExit {
            code: None,
            signal: None,
        };
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(unknown),
            Err(_) => unknown,
        }
    }

    /// How it ended; None while it runs.
    pub fn exited(&self) -> Option<VmmExit> {
        *self.exit.borrow()
    }

    /// Kills the VM and all its helpers at once. Succeeds on what is gone; [`VmmChild::wait`] tells when it is done.
    pub fn kill(&self) {
        let alive = self.shared.alive.lock();
        if let Some(pid) = *alive {
            // It can only fail with ESRCH, and the lock excludes that.
            let _gone = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
    }

    /// The last lines of the guest's console.
    pub fn console_tail(&self, lines: usize) -> Vec<String> {
        self.console.tail(lines)
    }

    /// The last lines of the vmm child's standard error.
    pub fn stderr_tail(&self, lines: usize) -> Vec<String> {
        self.stderr.tail(lines)
    }
}
