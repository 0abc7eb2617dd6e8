//! Network, mount, PID, IPC and UTS namespaces for the whole program, so that bridges, iptables rules, a registry on
//! port 5000, mounts and orphaned shims do not affect the machine and disappear with the program.
//!
//! Three processes: the original one waits outside; [`Stage::Init`] is PID 1 of the namespaces and only reaps (orphaned
//! shims become its children, as on a node they become init's); the third runs the command.

use crate::failure::{During, Result};
use nix::mount::MsFlags;
use nix::sys::wait::{WaitStatus, wait};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const STAGE: &str = "BOXLITE_E2E_STAGE";
const SCRATCH: &str = "BOXLITE_E2E_SCRATCH";

/// Directories in /run that the programs under test use by default.
pub(crate) const RUN_DIRECTORIES: [&str; 3] = ["/run/netns", "/run/boxlite", "/run/containerd"];

/// Role of the current process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The original process, outside the namespaces.
    Outside,
    /// PID 1 of the namespaces.
    Init,
    /// The worker inside the namespaces.
    Inside,
}

impl Stage {
    /// Reads the stage from the environment.
    pub(crate) fn current() -> Self {
        match std::env::var(STAGE).as_deref() {
            Ok("init") => Self::Init,
            Ok("inside") => Self::Inside,
            _ => Self::Outside,
        }
    }
}

/// Beginning of the name of every scratch directory.
pub(crate) const SCRATCH_PREFIX: &str = "bx-";

/// Creates the namespaces, runs this command line in them and returns its exit code. Removes the scratch directory.
pub(crate) fn enter() -> Result<ExitCode> {
    // Short, because unix socket paths are limited to 107 bytes.
    let scratch = tempfile::Builder::new()
        .prefix(SCRATCH_PREFIX)
        .rand_bytes(4)
        .tempdir_in("/tmp")?;
    let status = Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--pid",
            "--ipc",
            "--uts",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["--propagation", "private", "--"])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "init")
        .env(SCRATCH, scratch.path())
        .status()
        .during("unshare (util-linux; needs root)")?;
    crate::cgroups::remove(scratch.path())?;
    Ok(exit_code(status.code()))
}

/// Runs the worker and reaps orphans until the worker has ended.
pub(crate) fn reap() -> Result<ExitCode> {
    prepare().during("preparing the namespaces")?;
    let worker = Command::new(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .env(STAGE, "inside")
        .spawn()?;
    let worker = nix::unistd::Pid::from_raw(i32::try_from(worker.id())?);
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == worker => return Ok(exit_code(Some(code))),
            Ok(WaitStatus::Signaled(pid, _, _)) if pid == worker => return Ok(ExitCode::FAILURE),
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Returns the scratch directory: a tmpfs in the mount namespace. Timings need all state in memory: on disk, the same
/// runtime varies by more than a factor of two.
pub(crate) fn scratch() -> PathBuf {
    std::env::var_os(SCRATCH).map_or_else(|| "/tmp".into(), PathBuf::from)
}

fn exit_code(code: Option<i32>) -> ExitCode {
    code.and_then(|c| u8::try_from(c).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from)
}

fn prepare() -> Result {
    // Mounts of a node are shared; pods' volumes and the shims' slave namespaces rely on it.
    mount(
        None,
        "/".as_ref(),
        None,
        MsFlags::MS_SHARED | MsFlags::MS_REC,
        None,
    )?;
    tmpfs(&scratch(), "mode=0755,size=75%")?;
    for dir in RUN_DIRECTORIES.iter().chain(&["/var/lib/cni"]) {
        std::fs::create_dir_all(dir)?;
        tmpfs(dir.as_ref(), "mode=0755,size=64m")?;
    }
    run("ip", &["link", "set", "lo", "up"])?;
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
    Ok(())
}

/// Mounts a tmpfs.
pub(crate) fn tmpfs(target: &Path, options: &str) -> Result {
    mount(
        Some("tmpfs"),
        target,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(options),
    )
}

fn mount(
    source: Option<&str>,
    target: &Path,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result {
    nix::mount::mount(source, target, kind, flags, data)
        .during(format!("mount {}", target.display()))
}

/// Runs a program to completion. The failure includes its standard error.
pub(crate) fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program).args(args).output().during(program)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    crate::ensure!(
        output.status.success(),
        "{program} {}: {}: {}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(text)
}
