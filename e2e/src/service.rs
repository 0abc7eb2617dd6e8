//! [`Service`]: process of a daemon under test: starts it with its output in a log, waits until it answers, and ends it.
//!
//! The user defines the command and the readiness check: [`crate::node`] for boxlite-cri, [`crate::containerd`] for
//! containerd.

use crate::failure::{During, Failure, Result};
use crate::{bail, ensure, poll};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

/// Time limit until a daemon answers; boxlite-cri probes the VMM first.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit for an orderly shutdown.
const TERMINATION_TIMEOUT: Duration = Duration::from_secs(20);
/// Lines of the log in the error for a daemon that ended.
const TAIL_LINES: usize = 20;

/// A daemon's process, killed on drop.
pub(crate) struct Service {
    name: &'static str,
    log: PathBuf,
    process: Mutex<Option<Child>>,
}

/// Returns an address of the loopback with a port that nothing listens on.
pub(crate) async fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0").await?.local_addr()?)
}

impl Service {
    /// Creates a service without starting it.
    pub(crate) fn new(name: &'static str, log: PathBuf) -> Self {
        Self {
            name,
            log,
            process: Mutex::new(None),
        }
    }

    /// Starts the process and waits until `ask` succeeds.
    pub(crate) async fn start<F, Fut>(&self, mut command: Command, ask: F) -> Result
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result>,
    {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .during(self.name)?;
        *self.process.lock().await = Some(child);
        // A daemon that ended never answers, so its exit ends the wait.
        poll::until(&format!("{} answers", self.name), START_TIMEOUT, || async {
            if let Some(child) = self.process.lock().await.as_mut()
                && child.try_wait()?.is_some()
            {
                let text = format!("{} ended:\n{}", self.name, self.tail(0, TAIL_LINES));
                return Ok(Err(Failure(text)));
            }
            ask().await?;
            Ok(Ok(()))
        })
        .await?
    }

    /// Returns true if the process was started and has ended.
    pub(crate) async fn has_ended(&self) -> Result<bool> {
        match self.process.lock().await.as_mut() {
            Some(child) => Ok(child.try_wait()?.is_some()),
            None => Ok(false),
        }
    }

    /// Returns the pid of the running daemon.
    pub(crate) async fn pid(&self) -> Result<i32> {
        let process = self.process.lock().await;
        match process.as_ref().and_then(Child::id) {
            Some(pid) => Ok(pid.try_into()?),
            None => bail!("{} does not run", self.name),
        }
    }

    /// Kills the daemon with SIGKILL, as a crash would.
    pub(crate) async fn kill(&self) -> Result {
        if let Some(mut child) = self.process.lock().await.take() {
            child.start_kill()?;
            child.wait().await?;
        }
        Ok(())
    }

    /// Terminates the daemon with SIGTERM and waits, as an upgrade does; it must exit with 0.
    pub(crate) async fn terminate(&self) -> Result {
        if let Some(mut child) = self.process.lock().await.take() {
            if let Some(pid) = child.id() {
                let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
            }
            let status = tokio::time::timeout(TERMINATION_TIMEOUT, child.wait())
                .await
                .during("SIGTERM")??;
            ensure!(
                status.success(),
                "after SIGTERM {} ended with {status}:\n{}",
                self.name,
                self.tail(0, TAIL_LINES)
            );
        }
        Ok(())
    }

    /// Returns the path of the log.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Returns the length of the log in bytes.
    pub(crate) fn length(&self) -> usize {
        std::fs::read(&self.log).map_or(0, |bytes| bytes.len())
    }

    /// Returns the last lines written after `mark` bytes.
    pub(crate) fn tail(&self, mark: usize, lines: usize) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[mark.min(bytes.len())..]);
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}
