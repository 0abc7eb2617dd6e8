//! [`Kubectl`]: runs kubectl as a user would and returns its output.

use crate::ensure;
use crate::failure::{During, Failure, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// Limit of one command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(240);

/// kubectl with the administrator's configuration.
#[derive(Debug, Clone)]
pub(crate) struct Kubectl {
    /// Path of kubectl.
    pub program: PathBuf,
    /// Administrator's kubeconfig.
    pub kubeconfig: PathBuf,
    /// Default namespace.
    pub namespace: String,
}

/// Result of a command that may fail.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Exit code, -1 after a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Returns standard output as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl Kubectl {
    /// Returns a command without arguments, for callers that use its streams.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(format!("--namespace={}", self.namespace))
            .env("KUBECONFIG", &self.kubeconfig)
            .env("HOME", self.kubeconfig.with_file_name("home"))
            .kill_on_drop(true);
        command
    }

    /// Runs a command and returns its exit code and output.
    pub(crate) async fn try_run(&self, args: &[&str], stdin: &[u8]) -> Result<Finished> {
        let mut child = self
            .command()
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .during("kubectl")?;
        let mut input = child
            .stdin
            .take()
            .ok_or_else(|| Failure("kubectl has no standard input".into()))?;
        let bytes = stdin.to_vec();
        // A separate task, since the command may write before it has read everything.
        let feed = tokio::spawn(async move {
            let _ = input.write_all(&bytes).await;
        });
        let output = tokio::time::timeout(COMMAND_TIMEOUT, child.wait_with_output())
            .await
            .during(format!("kubectl {}", args.join(" ")))??;
        feed.abort();
        Ok(Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs a command that must succeed and returns its output.
    pub(crate) async fn run(&self, args: &[&str]) -> Result<String> {
        let done = self.try_run(args, b"").await?;
        ensure!(
            done.code == 0,
            "kubectl {}: exit code {}: {}{}",
            args.join(" "),
            done.code,
            done.text().trim(),
            done.stderr.trim()
        );
        Ok(done.text())
    }

    /// Runs a command that prints JSON.
    pub(crate) async fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.run(&[args, &["-o", "json"]].concat()).await?;
        serde_json::from_str(&text).during(args.join(" "))
    }

    /// Creates or updates an object.
    pub(crate) async fn apply(&self, object: &Value) -> Result {
        let bytes = serde_json::to_vec(object)?;
        let done = self.try_run(&["apply", "-f", "-"], &bytes).await?;
        ensure!(
            done.code == 0,
            "kubectl apply: {}: {object}",
            done.stderr.trim()
        );
        Ok(())
    }
}
