//! [`Program`]: a logging program of containerd's `binary://` URIs, which reads a container's output and puts it where it likes.
//!
//! ```text
//! binary:///path/to/program?key=value   →   program key value
//! descriptors 3 and 4: stdout and stderr · 5: to be closed when it is ready · CONTAINER_ID, CONTAINER_NAMESPACE
//! ```
//!
//! Standard library and tokio give a child its descriptors 0 to 2 and no others, so the program is started by this binary in the
//! role `log-program`, which has the three as its own 0 to 2, moves them and executes it. Lines and formats are the program's.

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

/// How long a program may take to be ready. Until then the container is not created.
const READY_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to end after its input did; containerd's own shim waits as long.
const END_LIMIT: Duration = Duration::from_secs(12);
/// Most words a URI may carry.
const WORD_LIMIT: usize = 128;

/// A program that runs. Dropping it leaves it running: its input has ended then, and tokio reaps it.
#[derive(Debug)]
pub struct Program {
    child: Box<Child>,
    name: String,
}

/// A program with the ends of its pipes.
pub struct Started {
    /// See [`Program`].
    pub program: Program,
    /// It reads this as descriptor 3.
    pub stdout: pipe::Sender,
    /// It reads this as descriptor 4.
    pub stderr: pipe::Sender,
}

impl Program {
    /// Starts the program of `uri` and waits until it is ready. Dropping the future leaves a program whose input ends.
    ///
    /// # Errors
    /// Invalid for a URI without absolute path, or a program that ends or stays silent; Io where it cannot be run.
    pub async fn start(uri: &str, namespace: &str, container: &str) -> Result<Started> {
        let words = words(uri)?;
        let failed = |action| ShimError::io(action, &words[0]);
        let pipe = || pipe::pipe().map_err(failed("make a pipe for"));
        let ((stdout, out), (stderr, err)) = (pipe()?, pipe()?);
        let (ready_in, mut ready) = pipe()?;
        let own =
            |end: io::Result<OwnedFd>| end.map(Stdio::from).map_err(failed("make a pipe for"));
        let this = std::env::current_exe().map_err(failed("find the shim's program to run"))?;
        let mut child = Command::new(this)
            .arg("log-program")
            .args(&words)
            .env("CONTAINER_ID", container)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(own(out.into_blocking_fd())?)
            .stdout(own(ready_in.into_blocking_fd())?)
            .stderr(own(err.into_blocking_fd())?)
            .spawn()
            .map_err(failed("run"))?;
        let told = tokio::time::timeout(READY_LIMIT, ready.read_u8()).await;
        let refuse = |reason: String| ShimError::Invalid {
            field: "stdout",
            reason: format!("logging program {}: {reason}", words[0]),
        };
        if told.is_err() {
            drop(child.start_kill());
            return Err(refuse(format!(
                "not ready within {} s (it must close descriptor 5)",
                READY_LIMIT.as_secs()
            )));
        }
        // It closed the descriptor, or ended: a status is there at once then, or a moment later.
        if let Ok(Ok(status)) = tokio::time::timeout(Duration::from_millis(20), child.wait()).await
            && !status.success()
        {
            return Err(refuse(format!("ended with {status}")));
        }
        Ok(Started {
            program: Self {
                child: Box::new(child),
                name: words[0].clone(),
            },
            stdout,
            stderr,
        })
    }

    /// Waits for its end after its input ended, and ends it when that takes too long.
    pub async fn finish(mut self) {
        match tokio::time::timeout(END_LIMIT, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => {}
            Ok(status) => tracing::warn!(program = self.name, ?status, "logging program"),
            Err(_) => {
                tracing::warn!(program = self.name, "logging program does not end; killed");
                drop(self.child.kill().await);
            }
        }
    }
}

/// Program and arguments: containerd makes a word of each key and of each value.
fn words(uri: &str) -> Result<Vec<String>> {
    let invalid = |reason: &str| ShimError::Invalid {
        field: "stdout",
        reason: format!("{uri:?}: {reason}"),
    };
    let parsed = url::Url::parse(uri).map_err(|error| invalid(&error.to_string()))?;
    let path = parsed
        .to_file_path_of_binary()
        .ok_or_else(|| invalid("no absolute path of a program"))?;
    let mut words = vec![path];
    for (key, value) in parsed.query_pairs() {
        words.push(key.into_owned());
        if !value.is_empty() {
            words.push(value.into_owned());
        }
    }
    match words.len() > WORD_LIMIT || words.iter().any(|word| word.contains('\0')) {
        true => Err(invalid("too many words, or a NUL in one")),
        false => Ok(words),
    }
}

trait BinaryPath {
    fn to_file_path_of_binary(&self) -> Option<String>;
}

impl BinaryPath for url::Url {
    /// Like `to_file_path`, which only takes `file:`.
    fn to_file_path_of_binary(&self) -> Option<String> {
        let mut file = url::Url::parse("file:///").ok()?;
        file.set_path(self.path());
        let path = file.to_file_path().ok()?;
        let plain = !self.cannot_be_a_base() && matches!(self.host_str(), None | Some(""));
        (plain && path.is_absolute() && path.file_name().is_some())
            .then(|| path.to_string_lossy().into_owned())
    }
}

/// The role `log-program`: descriptors 0 (stdout's pipe), 2 (stderr's) and 1 (ready) become 3, 4 and 5 of the program.
/// Returns only on failure.
pub fn run(args: &[OsString]) -> ExitCode {
    // No message: descriptor 2 is not one to write to. The exit code is the message.
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

/// Makes the free descriptor `wanted` a copy of `fd` that an executed program keeps.
fn move_to(fd: impl AsFd, wanted: i32) -> io::Result<()> {
    let got = fcntl(fd, FcntlArg::F_DUPFD(wanted))?;
    match got == wanted {
        true => Ok(()),
        false => Err(io::Error::other(format!("descriptor {wanted} is taken"))),
    }
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn a_uri_becomes_a_command_line() {
        let of = |uri: &str| words(uri).expect("valid");
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
            assert!(words(bad).is_err(), "{bad}");
        }
    }
}
