//! [`Supervisor`] starts the vmm child; [`VmmChild`] is the shim's handle on it: wait, kill, last output.
//!
//! The child is this binary in the role `vmm`, PID 1 of a separate PID namespace, so everything the VMM started dies with it. Its
//! parent-death signal is SIGKILL. That signal fires when the *thread* that forked it ends, so a dedicated thread per child
//! forks and waits.
//!
//! The spec is sent over a pipe on standard input, not in argv. The pipe remains open until the child exits; a child that finds
//! it closed knows that its shim has died. The console is standard output, messages are standard error.

use super::console::BoundedLog;
use boxlite_proto::names::CONSOLE_LOG;
use boxlite_proto::vmm::InstanceSpec;
use boxlite_sys::sync::Mutex;
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::watch;

/// File in the VM's working directory with the vmm child's standard error.
const STDERR_LOG: &str = "vmm.log";

/// Timeout for reading the remaining output of a dead child. Its pipes have no other writer, so this takes milliseconds.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_millis(500);

/// Exit status of a vmm child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmmExit {
    /// Exit code, unless killed by a signal.
    pub code: Option<i32>,
    /// Signal that killed it.
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

/// Error while starting a vmm child.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A system call failed.
    #[error("failed to {step} the vmm child")]
    Step {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The spec cannot be serialized.
    #[error("failed to serialize instance spec")]
    Spec(#[source] serde_json::Error),
}

/// Starts vmm children.
#[derive(Debug, Clone)]
pub struct Supervisor {
    program: PathBuf,
}

impl Default for Supervisor {
    fn default() -> Self {
        // Not a file system path: the binary may be replaced by an upgrade.
        Self::new(PathBuf::from("/proc/self/exe"))
    }
}

impl Supervisor {
    /// Uses another binary than the running one (for tests).
    pub fn new(program: PathBuf) -> Self {
        Self { program }
    }

    /// Starts a child for `spec`, whose working directory must exist. Blocks for a fork and exec.
    ///
    /// # Errors
    /// The child could not be started. Later failures inside the child show as its exit.
    pub fn spawn(&self, spec: &InstanceSpec) -> Result<VmmChild, SpawnError> {
        let step = |step| move |source| SpawnError::Step { step, source };
        let mut line = serde_json::to_vec(spec).map_err(SpawnError::Spec)?;
        line.push(b'\n');

        let mut command = Command::new(&self.program);
        // A separate process group, so that a terminal's ctrl-C reaches only the shim. argv[1] is for ps and not secret.
        command
            .arg("vmm")
            .arg(&spec.id)
            .env_clear()
            .process_group(0);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());

        // Before the child starts: later it may put links under these names.
        let console_file = log_file(&spec.work_dir.join(CONSOLE_LOG));
        let stderr_file = log_file(&spec.work_dir.join(STDERR_LOG));
        let (exit_to, exit) = watch::channel(None);
        let (started_to, started) = mpsc::sync_channel(1);
        let shared = Arc::new(Shared::default());
        let hold = Arc::clone(&shared);
        let (console, stderr) = (BoundedLog::default(), BoundedLog::default());
        let logs = [console.clone(), stderr.clone()];
        // Not joined: it ends with the child, which `exit` reports.
        std::thread::Builder::new()
            .name("vmm-child".to_owned())
            .spawn(move || fork_and_wait(command, &hold, &logs, &started_to, &exit_to))
            .map_err(step("start a thread for"))?;
        let gone = || std::io::Error::other("thread ended");
        let mut child = started
            .recv()
            .map_err(|_| step("start")(gone()))?
            .map_err(step("start"))?;

        if let Some(from) = child.stdout.take() {
            follow("vmm-console", &console, from, console_file).map_err(step("read output of"))?;
        }
        if let Some(from) = child.stderr.take() {
            follow("vmm-stderr", &stderr, from, stderr_file).map_err(step("read output of"))?;
        }
        let child = VmmChild {
            shared,
            exit,
            console,
            stderr,
            _spec_pipe: Arc::new(child.stdin.take()),
        };
        if let Some(mut pipe) = child._spec_pipe.as_ref().as_ref() {
            // A child that exited at once shows as its exit, with its message, rather than as a broken pipe.
            match pipe.write_all(&line) {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    child.kill();
                    return Err(step("write the spec to")(error));
                }
                _ => {}
            }
        }
        Ok(child)
    }
}

/// Creates a log in the VM's working directory; None if the disk refuses, since the VM runs without its log.
fn log_file(path: &Path) -> Option<File> {
    let created = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path);
    created
        .inspect_err(|error| tracing::warn!(path = %path.display(), %error, "failed to create log"))
        .ok()
}

fn follow(
    name: &str,
    log: &BoundedLog,
    from: impl std::io::Read + Send + 'static,
    file: Option<File>,
) -> std::io::Result<()> {
    let log = log.clone();
    // Not joined: it ends when the child, the last writer, has exited; `wait_end` waits for that.
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || log.follow(from, file))?;
    Ok(())
}

#[derive(Default)]
struct Shared {
    /// Set from the fork until just before the child is reaped, while the pid cannot be reused.
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
    // Only children of this thread are created in the new PID namespace.
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
        log.wait_end(LAST_OUTPUT_TIMEOUT);
    }
    exit.send_replace(Some(ended));
}

fn wait_for(child: &mut Child, pid: Pid, shared: &Shared) -> VmmExit {
    // Keep the zombie until the pid can no longer be signaled.
    while let Err(nix::errno::Errno::EINTR) =
        waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
    {}
    *shared.alive.lock() = None;
    match child.wait() {
        Ok(status) => VmmExit {
            code: status.code(),
            signal: status.signal(),
        },
        // Reaped elsewhere: it has exited with an unknown status.
        Err(_) => VmmExit {
            code: None,
            signal: None,
        },
    }
}

/// The shim's handle on a vmm child. Clones refer to the same child. Dropping all of them only closes the spec pipe; to end the
/// VM, call [`VmmChild::kill`].
#[derive(Clone)]
pub struct VmmChild {
    shared: Arc<Shared>,
    exit: watch::Receiver<Option<VmmExit>>,
    console: BoundedLog,
    stderr: BoundedLog,
    _spec_pipe: Arc<Option<std::process::ChildStdin>>,
}

impl VmmChild {
    /// Returns the process id in the shim's PID namespace, also after exit.
    pub fn pid(&self) -> i32 {
        *self.shared.pid.lock()
    }

    /// Waits until the VM has exited. Cancel-safe; may be called concurrently.
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

    /// Returns how it exited; None while it runs.
    pub fn exited(&self) -> Option<VmmExit> {
        *self.exit.borrow()
    }

    /// Kills the VM and all its helpers. Succeeds if already exited; [`VmmChild::wait`] completes when they are gone.
    pub fn kill(&self) {
        let alive = self.shared.alive.lock();
        if let Some(pid) = *alive {
            // Only ESRCH is possible, and the lock excludes it.
            let _gone = nix::sys::signal::kill(pid, Signal::SIGKILL);
        }
    }

    /// Returns the last lines of the guest's console.
    pub fn console_tail(&self, lines: usize) -> Vec<String> {
        self.console.tail(lines)
    }

    /// Returns the last lines of the vmm child's standard error.
    pub fn stderr_tail(&self, lines: usize) -> Vec<String> {
        self.stderr.tail(lines)
    }
}
