//! [`Program`]: a logging program of containerd's `binary://` URIs, which receives a container's output.
//!
//! ```text
//! binary:///path/to/program?key=value   →   program key value
//! descriptors 3 and 4: stdout and stderr · 5: closed by the program when it is ready · CONTAINER_ID, CONTAINER_NAMESPACE
//! ```
//!
//! The standard library and tokio only set descriptors 0 to 2 of a child. So this binary is started in the role `log-program`
//! with the three pipes as its descriptors 0 to 2; it moves them and executes the program.

use crate::error::{Result, ShimError};
use nix::fcntl::{FcntlArg, fcntl};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{ExitCode, Stdio};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

/// Timeout for a program to become ready, during which Create waits.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for a program to exit after the end of its input, as in containerd's shim.
const EXIT_TIMEOUT: Duration = Duration::from_secs(12);
/// Maximum number of arguments in a URI.
const MAX_ARGUMENTS: usize = 128;

/// A running program. Dropping it does not stop it: its input ends, and tokio reaps it.
#[derive(Debug)]
pub struct Program {
    child: Box<Child>,
    name: String,
}

/// A started program with its pipes.
pub struct Started {
    /// The running program.
    pub program: Program,
    /// Read by the program as descriptor 3.
    pub stdout: pipe::Sender,
    /// Read by the program as descriptor 4.
    pub stderr: pipe::Sender,
}

impl Program {
    /// Starts the program of `uri` and waits until it is ready. If the future is dropped, the program's input ends.
    ///
    /// # Errors
    /// Invalid for a URI without an absolute path, or a program that exits or times out; Io if it cannot be run.
    pub async fn start(uri: &str, namespace: &str, container: &str) -> Result<Started> {
        let command = command_line(uri)?;
        let failed = |action| ShimError::io(action, &command[0]);
        let pipe = || pipe::pipe().map_err(failed("create a pipe for"));
        let ((stdout, out), (stderr, err)) = (pipe()?, pipe()?);
        let (ready_in, mut ready_out) = pipe()?;
        let stdio =
            |end: io::Result<OwnedFd>| end.map(Stdio::from).map_err(failed("create a pipe for"));
        let this = std::env::current_exe().map_err(failed("locate the shim binary to run"))?;
        let mut child = Command::new(this)
            .arg("log-program")
            .args(&command)
            .env("CONTAINER_ID", container)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(stdio(out.into_blocking_fd())?)
            .stdout(stdio(ready_in.into_blocking_fd())?)
            .stderr(stdio(err.into_blocking_fd())?)
            .spawn()
            .map_err(failed("run"))?;
        let ready = tokio::time::timeout(READY_TIMEOUT, ready_out.read_u8()).await;
        let invalid = |reason: String| ShimError::Invalid {
            field: "stdout",
            reason: format!("logging program {}: {reason}", command[0]),
        };
        if ready.is_err() {
            drop(child.start_kill());
            return Err(invalid(format!(
                "not ready within {} s (it must close descriptor 5)",
                READY_TIMEOUT.as_secs()
            )));
        }
        // It closed the descriptor or exited; in that case its status is available within moments.
        if let Ok(Ok(status)) = tokio::time::timeout(Duration::from_millis(20), child.wait()).await
            && !status.success()
        {
            return Err(invalid(format!("exited with {status}")));
        }
        Ok(Started {
            program: Self {
                child: Box::new(child),
                name: command[0].clone(),
            },
            stdout,
            stderr,
        })
    }

    /// Waits for the exit after the end of the input, and kills the program on a timeout.
    pub async fn finish(mut self) {
        match tokio::time::timeout(EXIT_TIMEOUT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => {}
            Ok(status) => tracing::warn!(program = self.name, ?status, "logging program failed"),
            Err(_) => {
                tracing::warn!(
                    program = self.name,
                    "timed out waiting for logging program to exit, killing it"
                );
                drop(self.child.kill().await);
            }
        }
    }
}

/// Parses a URI into program and arguments; as in containerd, each key and each value is an argument.
fn command_line(uri: &str) -> Result<Vec<String>> {
    let invalid = |reason: &str| ShimError::Invalid {
        field: "stdout",
        reason: format!("{uri:?}: {reason}"),
    };
    let parsed = url::Url::parse(uri).map_err(|error| invalid(&error.to_string()))?;
    let path = parsed
        .to_file_path_of_binary()
        .ok_or_else(|| invalid("must contain an absolute path of a program"))?;
    let mut command = vec![path];
    for (key, value) in parsed.query_pairs() {
        command.push(key.into_owned());
        if !value.is_empty() {
            command.push(value.into_owned());
        }
    }
    match command.len() > MAX_ARGUMENTS || command.iter().any(|argument| argument.contains('\0')) {
        true => Err(invalid("too many arguments, or a NUL in one")),
        false => Ok(command),
    }
}

trait BinaryPath {
    fn to_file_path_of_binary(&self) -> Option<String>;
}

impl BinaryPath for url::Url {
    /// Like `to_file_path`, which only accepts `file:`.
    fn to_file_path_of_binary(&self) -> Option<String> {
        let mut file = url::Url::parse("file:///").ok()?;
        file.set_path(self.path());
        let path = file.to_file_path().ok()?;
        let plain = !self.cannot_be_a_base() && matches!(self.host_str(), None | Some(""));
        (plain && path.is_absolute() && path.file_name().is_some())
            .then(|| path.to_string_lossy().into_owned())
    }
}

/// Runs the role `log-program`: moves descriptors 0 (stdout pipe), 2 (stderr pipe) and 1 (readiness) to 3, 4 and 5, and
/// executes the program. Returns only on failure.
pub fn run(args: &[OsString]) -> ExitCode {
    // Errors are reported by the exit code only, since descriptor 2 is the program's input.
    let Some((program, args)) = args.split_first() else {
        return boxlite_proto::exit::ExitCode::BadArguments.into();
    };
    let moved = move_to(io::stdin().as_fd(), 3)
        .and_then(|()| move_to(io::stderr().as_fd(), 4))
        .and_then(|()| move_to(io::stdout().as_fd(), 5));
    if moved.is_err() {
        return boxlite_proto::exit::ExitCode::Failure.into();
    }
    let _error = std::process::Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .exec();
    boxlite_proto::exit::ExitCode::Failure.into()
}

/// Duplicates `fd` to the unused descriptor `target`, which remains open across exec.
fn move_to(fd: impl AsFd, target: i32) -> io::Result<()> {
    let got = fcntl(fd, FcntlArg::F_DUPFD(target))?;
    match got == target {
        true => Ok(()),
        false => Err(io::Error::other(format!("descriptor {target} is in use"))),
    }
}

#[cfg(test)]
mod tests {
    use super::command_line;

    #[test]
    fn command_line_splits_uri_into_arguments() {
        let of = |uri: &str| command_line(uri).expect("valid");
        assert_eq!(of("binary:///usr/bin/log%20it"), ["/usr/bin/log it"]);
        assert_eq!(
            of("binary:///bin/log?id=x%2Fy&verbose&dir=/var/log"),
            ["/bin/log", "id", "x/y", "verbose", "dir", "/var/log"]
        );
        for bad in [
            "binary://",
            "binary://host/bin/log",
            "binary:relative",
            "binary:///",
        ] {
            assert!(command_line(bad).is_err(), "{bad}");
        }
    }
}
