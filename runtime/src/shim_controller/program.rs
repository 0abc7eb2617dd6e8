//! [`ShimProgram`]: runs the shim binary's actions (`start`, `delete`, `probe`) as containerd does and parses their
//! output.
//!
//! The process that `start` leaves running survives the death of boxlite-cri. Calls to it are in
//! [`super::ShimController`].

use crate::error::{Result, RuntimeError};
use crate::filesystem_layout::FilesystemLayout;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// containerd namespace under which boxlite-cri runs its shims.
pub const NAMESPACE: &str = "boxlite";
/// Newest supported version of the bootstrap protocol.
const MAX_SHIM_VERSION: &str = "3";
/// Timeout of `start`, which returns once the shim serves; the shim bounds that by 20 s.
pub const START_TIMEOUT: Duration = Duration::from_secs(40);
/// Timeout of `delete`, which kills remaining processes; the shim bounds that by 10 s each for shim, VMM and cgroup.
pub const DELETE_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of `probe`, which boots a temporary VM, possibly under emulation.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum number of bytes read from an action's stdout.
const MAX_STDOUT_BYTES: u64 = 1 << 20;
/// Maximum number of bytes read from an action's stderr, which becomes part of an error message.
const MAX_STDERR_BYTES: u64 = 16 << 10;

/// Path of the shim and the addresses it is started with.
#[derive(Debug, Clone)]
pub struct ShimProgram {
    program: PathBuf,
    events: PathBuf,
    containerd: PathBuf,
}

impl ShimProgram {
    /// Returns the shim at `program` with the sockets of `layout`.
    pub fn new(program: &Path, layout: &FilesystemLayout) -> Self {
        Self {
            program: program.to_owned(),
            events: layout.events_socket(),
            containerd: layout.containerd_address(),
        }
    }

    /// Returns the path of the binary.
    pub fn path(&self) -> &Path {
        &self.program
    }

    /// Starts the shim of a box, or finds the running one, and returns its address. Dropping the future kills the action
    /// but may leave a shim running: call [`Self::delete`] afterwards.
    ///
    /// # Errors
    /// `Missing`, `ShimProgram`, `Deadline`.
    pub async fn start(&self, box_id: &str, bundle: &Path) -> Result<String> {
        let mut command = self.command(box_id, bundle);
        command.arg("start");
        let output = run("start", command, START_TIMEOUT).await?;
        parse_bootstrap(&output)
    }

    /// Kills the remaining processes of a shim and cleans up after it; idempotent.
    ///
    /// # Errors
    /// `Missing`, `ShimProgram`, `Deadline`.
    pub async fn delete(&self, box_id: &str, bundle: &Path) -> Result<()> {
        let mut command = self.command(box_id, bundle);
        command.arg("-bundle").arg(bundle).arg("delete");
        run("delete", command, DELETE_TIMEOUT).await.map(drop)
    }

    /// Runs an action that containerd does not define and returns its stdout.
    ///
    /// # Errors
    /// `Missing`, `ShimProgram`, `Deadline`.
    pub async fn role(
        &self,
        role: &'static str,
        arguments: &[&std::ffi::OsStr],
        limit: Duration,
    ) -> Result<Vec<u8>> {
        let mut command = Command::new(&self.program);
        command.arg(role).args(arguments);
        run(role, command, limit).await
    }

    fn command(&self, box_id: &str, bundle: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["-namespace", NAMESPACE, "-id", box_id])
            .arg("-address")
            .arg(&self.containerd)
            // containerd passes its own binary here; our shims publish over TTRPC_ADDRESS and do not execute it.
            .args(["-publish-binary", "/bin/false"])
            .current_dir(bundle)
            .env("TTRPC_ADDRESS", &self.events)
            .env("MAX_SHIM_VERSION", MAX_SHIM_VERSION);
        command
    }
}

/// Runs an action to completion with bounded time and output.
async fn run(action: &'static str, mut command: Command, limit: Duration) -> Result<Vec<u8>> {
    let program = PathBuf::from(command.as_std().get_program());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|source| RuntimeError::Missing {
        subject: "shim",
        path: program,
        source,
    })?;
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    let all = async {
        let (stdout, stderr) = tokio::join!(
            read_bounded(stdout, MAX_STDOUT_BYTES),
            read_bounded(stderr, MAX_STDERR_BYTES)
        );
        (stdout, stderr, child.wait().await)
    };
    let (stdout, stderr, status) =
        tokio::time::timeout(limit, all)
            .await
            .map_err(|_| RuntimeError::Deadline {
                detail: format!("the shim's action {action:?} did not finish"),
                limit,
            })?;
    let status = status.map_err(|error| RuntimeError::ShimProgram {
        action,
        reason: error.to_string(),
    })?;
    if status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&stderr);
    Err(RuntimeError::ShimProgram {
        action,
        reason: format!("{status}: {}", stderr.trim()),
    })
}

async fn read_bounded(pipe: Option<impl AsyncRead + Unpin>, limit: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // A read error shows up as output that cannot be parsed.
        let _ = pipe.take(limit).read_to_end(&mut bytes).await;
    }
    bytes
}

/// Extracts the address from the output of `start`: JSON of version 2 or 3, or the plain address of containerd 1.6.
fn parse_bootstrap(output: &[u8]) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Answer {
        version: u32,
        address: String,
        protocol: String,
    }
    let refuse = |reason: String| RuntimeError::ShimProgram {
        action: "start",
        reason,
    };
    let text = std::str::from_utf8(output)
        .map_err(|_| refuse("output is not UTF-8".into()))?
        .trim();
    let address = if text.starts_with('{') {
        let answer: Answer = serde_json::from_str(text)
            .map_err(|error| refuse(format!("invalid output: {error}")))?;
        if !(2..=3).contains(&answer.version) || answer.protocol != "ttrpc" {
            return Err(refuse(format!(
                "unsupported version {} over {}, need 2 or 3 over ttrpc",
                answer.version, answer.protocol
            )));
        }
        answer.address
    } else {
        text.to_owned()
    };
    if !address.starts_with("unix:///") {
        return Err(refuse(format!(
            "invalid address {address:?}: not a unix socket"
        )));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_bootstrap_accepts_json_and_plain_address() {
        let json = br#"{"version":3,"address":"unix:///run/x","protocol":"ttrpc"}"#;
        assert_eq!(parse_bootstrap(json).unwrap(), "unix:///run/x");
        assert_eq!(
            parse_bootstrap(b"unix:///run/y\n").unwrap(),
            "unix:///run/y"
        );
        for bad in [
            &b"{\"version\":4,\"address\":\"unix:///x\",\"protocol\":\"ttrpc\"}"[..],
            b"{\"version\":3,\"address\":\"unix:///x\",\"protocol\":\"grpc\"}",
            b"{}",
            b"",
            b"tcp://127.0.0.1:1",
            b"\xff",
        ] {
            assert!(parse_bootstrap(bad).is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn run_reports_stderr_and_enforces_timeout() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo no kvm here >&2; exit 3"]);
        let error = run("probe", command, START_TIMEOUT)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no kvm here") && error.contains('3'),
            "{error}"
        );
        let mut command = Command::new("/bin/sleep");
        command.arg("60");
        let error = run("probe", command, Duration::from_millis(50))
            .await
            .unwrap_err();
        assert!(matches!(error, RuntimeError::Deadline { .. }), "{error}");
    }
}
