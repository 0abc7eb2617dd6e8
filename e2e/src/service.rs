//! [`Service`]: the process of a daemon under test: started with its output in a log, waited for until it answers, ended.
//!
//! What is run, and what an answer is, its user says: [`crate::node`] boxlite-cri, [`crate::containerd`] a containerd.

use crate::outcome::{During, Failure, Result};
use crate::{ensure, wait};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

/// Longest time until a daemon answers; boxlite-cri probes the VMM first.
const START: Duration = Duration::from_secs(60);
/// Longest orderly end.
const TERM: Duration = Duration::from_secs(20);
/// Lines of the log that are shown of a daemon that ended.
const TAIL: usize = 20;

/// See the module. Dropped, it kills the process.
pub struct Service {
    name: &'static str,
    log: PathBuf,
    process: Mutex<Option<Child>>,
}

impl Service {
    /// Nothing runs yet.
    pub fn new(name: &'static str, log: PathBuf) -> Self {
        Self {
            name,
            log,
            process: Mutex::new(None),
        }
    }

    /// Runs it and waits until `ask` succeeds.
    pub async fn start<F, Fut>(&self, mut command: Command, ask: F) -> Result
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
        // A daemon that ended will never answer: its death is a result of the wait, not a reason to go on.
        wait::until(&format!("{} answers", self.name), START, || async {
            if let Some(child) = self.process.lock().await.as_mut()
                && child.try_wait()?.is_some()
            {
                let text = format!("{} ended:\n{}", self.name, self.tail(0, TAIL));
                return Ok(Err(Failure(text)));
            }
            ask().await?;
            Ok(Ok(()))
        })
        .await?
    }

    /// kill -9 of the daemon alone, as a crash would.
    pub async fn kill(&self) -> Result {
        if let Some(mut child) = self.process.lock().await.take() {
            child.start_kill()?;
            child.wait().await?;
        }
        Ok(())
    }

    /// SIGTERM and wait, as an upgrade would; it must end with 0.
    pub async fn terminate(&self) -> Result {
        if let Some(mut child) = self.process.lock().await.take() {
            if let Some(pid) = child.id() {
                let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
                nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
            }
            let status = tokio::time::timeout(TERM, child.wait())
                .await
                .during("SIGTERM")??;
            ensure!(
                status.success(),
                "after SIGTERM {} ended with {status}:\n{}",
                self.name,
                self.tail(0, TAIL)
            );
        }
        Ok(())
    }

    /// Its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The log's length in bytes.
    pub fn length(&self) -> usize {
        std::fs::read(&self.log).map_or(0, |bytes| bytes.len())
    }

    /// The last lines of what was written behind `mark` bytes.
    pub fn tail(&self, mark: usize, lines: usize) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes[mark.min(bytes.len())..]);
        let all: Vec<_> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}
