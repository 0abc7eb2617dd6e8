//! [`ShimProgram`]: runs the shim binary's actions — `start`, `delete`, `probe` — as containerd would, and reads
//! their answers.
//!
//! The daemon that `start` leaves behind is not a child of this process in any sense that matters: it goes on when
//! boxlite-cri dies. Talking to it is [`super::ShimController`]'s.

use crate::error::{Result, RuntimeError};
use crate::filesystem_layout::FilesystemLayout;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;

/// containerd namespace under which boxlite-cri runs its shims.
pub const NAMESPACE: &str = "boxlite";
/// Newest version of the bootstrap answer that is understood.
const MAX_SHIM_VERSION: &str = "3";
/// `start` answers once its daemon serves, which the shim itself bounds by 20 s.
pub const START_LIMIT: Duration = Duration::from_secs(40);
/// `delete` kills what is left and waits for it, which the shim bounds by 10 s each for shim, VMM and cgroup.
pub const DELETE_LIMIT: Duration = Duration::from_secs(60);
/// `probe` runs a throw-away VM, under emulation too.
pub const PROBE_LIMIT: Duration = Duration::from_secs(60);
/// Most that is read of an action's standard output, in bytes.
const STDOUT_LIMIT: u64 = 1 << 20;
/// Most that is read of its standard error, in bytes; it ends in an error message.
const STDERR_LIMIT: u64 = 16 << 10;

/// Where the shim is and under which addresses it is started.
#[derive(Debug, Clone)]
pub struct ShimProgram {
    program: PathBuf,
    events: PathBuf,
    containerd: PathBuf,
}

impl ShimProgram {
    /// The shim at `program`, with the sockets of `layout`.
    pub fn new(program: &Path, layout: &FilesystemLayout) -> Self {
        Self {
            program: program.to_owned(),
            events: layout.events_socket(),
            containerd: layout.containerd_address(),
        }
    }

    /// The binary.
    pub fn path(&self) -> &Path {
        &self.program
    }

    /// Starts the shim of a box, or finds the one that runs; answers its address. Dropping the future kills the
    /// action, which may leave a daemon behind: follow it with [`Self::delete`].
    ///
    /// # Errors
    /// `Missing`, `ShimProgram`, `Deadline`.
    pub async fn start(&self, box_id: &str, bundle: &Path) -> Result<String> {
        let mut command = self.command(box_id, bundle);
        command.arg("start");
        let output = run("start", command, START_LIMIT).await?;
        parse_bootstrap(&output)
    }

    /// Cleans up after a shim that is gone, killing what is left of it; succeeds where nothing is.
    ///
    /// # Errors
    /// `Missing`, `ShimProgram`, `Deadline`.
    pub async fn delete(&self, box_id: &str, bundle: &Path) -> Result<()> {
        let mut command = self.command(box_id, bundle);
        command.arg("-bundle").arg(bundle).arg("delete");
        run("delete", command, DELETE_LIMIT).await.map(drop)
    }

    /// Runs a role of the binary that is not containerd's, with these arguments; answers its standard output.
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
            // containerd passes its own binary here; events go over TTRPC_ADDRESS and nothing is ever executed.
            .args(["-publish-binary", "/bin/false"])
            .current_dir(bundle)
            .env("TTRPC_ADDRESS", &self.events)
            .env("MAX_SHIM_VERSION", MAX_SHIM_VERSION);
        command
    }
}

/// Runs an action to its end, with everything bounded.
async fn run(action: &'static str, mut command: Command, limit: Duration) -> Result<Vec<u8>> {
    let program = PathBuf::from(command.as_std().get_program());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|source| RuntimeError::Missing {
        what: "a runnable shim",
        path: program,
        source,
    })?;
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    let all = async {
        let (stdout, stderr) = tokio::join!(
            read_bounded(stdout, STDOUT_LIMIT),
            read_bounded(stderr, STDERR_LIMIT)
        );
        (stdout, stderr, child.wait().await)
    };
    let (stdout, stderr, status) =
        tokio::time::timeout(limit, all)
            .await
            .map_err(|_| RuntimeError::Deadline {
                what: format!("the end of the shim's {action}"),
                limit,
            })?;
    let status = status.map_err(|error| RuntimeError::ShimProgram {
        action,
        reason: error.to_string(),
    })?;
    if status.success() {
        return Ok(stdout);
    }
    let words = String::from_utf8_lossy(&stderr);
    Err(RuntimeError::ShimProgram {
        action,
        reason: format!("{status}: {}", words.trim()),
    })
}

async fn read_bounded(pipe: Option<impl AsyncRead + Unpin>, limit: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What a broken pipe swallowed shows as an answer that cannot be parsed.
        let _ = pipe.take(limit).read_to_end(&mut bytes).await;
    }
    bytes
}

/// The address in a bootstrap answer: JSON of version 2 or 3, or the plain address of containerd 1.6.
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
        .map_err(|_| refuse("its answer is not text".into()))?
        .trim();
    let address = if text.starts_with('{') {
        let answer: Answer = serde_json::from_str(text)
            .map_err(|error| refuse(format!("its answer cannot be read: {error}")))?;
        if !(2..=3).contains(&answer.version) || answer.protocol != "ttrpc" {
            return Err(refuse(format!(
                "it answers version {} over {}, wanted 2 or 3 over ttrpc",
                answer.version, answer.protocol
            )));
        }
        answer.address
    } else {
        text.to_owned()
    };
    if !address.starts_with("unix:///") {
        return Err(refuse(format!("its address {address:?} is no unix socket")));
    }
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bootstrap_answers_are_read() {
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
    async fn a_failing_action_says_why_and_a_hanging_one_is_ended() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo no kvm here >&2; exit 3"]);
        let error = run("probe", command, START_LIMIT)
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
