//! The command line of the shim protocol: Go-style flags, then `start`, `delete`, or no action (the daemon itself).
//!
//! ```text
//! start   → bind the socket, spawn the daemon, wait until it is ready, print its address
//! delete  → after a crash: kill remaining processes, clean up, print a DeleteResponse
//! (none)  → run the daemon until ShutdownSandbox or Shutdown
//! ```
//!
//! Internal roles such as `vmm` are handled earlier, in [`crate::roles`].

pub mod bootstrap;
pub mod delete;
mod info;
pub mod start;

use crate::flags::Flags;
use boxlite_proto::exit::ExitCode;
use boxlite_sys::report::Report;
use std::ffi::OsString;
use std::io::Write;

/// Name of the runtime in containerd's configuration.
pub const RUNTIME_NAME: &str = "io.containerd.boxlite.v2";

/// Errors of the command line.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Invalid or missing flags.
    #[error("invalid command line: {reason}")]
    Arguments { reason: String },
    /// A failed file or socket operation; `action` is a verb.
    #[error("failed to {action} {path}")]
    Io {
        action: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// Invalid bootstrap message on standard input.
    #[error("invalid bootstrap input: {reason}")]
    Bootstrap { reason: String },
    /// The daemon exited or timed out before it was ready.
    #[error("failed to start the shim daemon: {reason}")]
    Daemon { reason: String },
    /// The response could not be encoded.
    #[error("failed to encode the response")]
    Encode(#[source] containerd_shim_protos::protobuf::Error),
    /// Failure of the daemon.
    #[error(transparent)]
    Serve(#[from] crate::daemon::DaemonError),
}

impl CliError {
    /// Wraps an I/O error with the action, a verb, and the path.
    pub fn io(
        action: &'static str,
        path: impl std::fmt::Display,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_string();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Arguments { .. } | Self::Bootstrap { .. } => ExitCode::BadArguments,
            Self::Io { .. } | Self::Daemon { .. } | Self::Encode(_) | Self::Serve(_) => {
                ExitCode::Failure
            }
        }
    }
}

/// Runs the command line of the shim protocol and returns the exit code. Errors are printed to standard error, which
/// containerd and boxlite-cri include in theirs.
pub fn main(args: &[OsString]) -> std::process::ExitCode {
    match run(args) {
        Ok(()) => ExitCode::Ok.into(),
        Err(error) => {
            eprintln!("containerd-shim-boxlite-v2: {}", Report(&error));
            error.exit_code().into()
        }
    }
}

/// Text of `--help`.
const HELP: &str = "\
containerd-shim-boxlite-v2: runs a Kubernetes pod, or a single container, in a microVM

Started by boxlite-cri or containerd (runtime io.containerd.boxlite.v2), not by hand.

Usage: containerd-shim-boxlite-v2 -namespace NS -id ID -address SOCKET [flags] [start|delete]

Actions:
  start    start the pod's shim, or find a running one, and print its address
  delete   clean up after a shim that crashed; run in its bundle
  (none)   run the shim itself, with its listening socket as standard input

Flags (with one or two dashes):
  -namespace NS         containerd namespace
  -id ID                sandbox or container id
  -address SOCKET       containerd's gRPC socket
  -publish-binary PATH  containerd's binary, which publishes events without a ttrpc socket
  -bundle DIR           bundle directory (delete; default: working directory)
  -socket PATH          path of the listening socket (set by start)
  -debug                log debug messages
  -info                 print the RuntimeInfo message; runtime options may be on standard input
  -v                    print the version
  -help                 print this text

Environment: TTRPC_ADDRESS, GRPC_ADDRESS, MAX_SHIM_VERSION; BOXLITE_SHIM_CONFIG names the configuration file.
Documentation: docs/containerd.md
";

fn run(args: &[OsString]) -> Result<(), CliError> {
    if args
        .iter()
        .any(|arg| ["-h", "-help", "--help"].iter().any(|help| arg == help))
    {
        return write_stdout(HELP.as_bytes());
    }
    let flags = Flags::parse(args).map_err(|error| CliError::Arguments {
        reason: error.to_string(),
    })?;
    if flags.version {
        println!("containerd-shim-boxlite-v2 {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        // Runtime options on standard input change none of the features.
        return write_stdout(&info::encoded()?);
    }
    if flags.id.is_empty() || flags.namespace.is_empty() {
        return Err(CliError::Arguments {
            reason: "-id and -namespace are required; -help explains the flags".to_owned(),
        });
    }
    match flags.action.as_str() {
        "start" => start::start(&flags),
        "delete" => delete::delete(&flags),
        "" => Ok(crate::daemon::serve(&flags)?),
        other => Err(CliError::Arguments {
            reason: format!("unknown action {other:?}"),
        }),
    }
}

/// Writes a response to standard output and flushes it; containerd reads until EOF.
pub(crate) fn write_stdout(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(CliError::io("write", "standard output"))
}

#[cfg(test)]
mod tests {
    use super::HELP;

    #[test]
    fn help_names_every_action_and_required_flag() {
        for word in ["start", "delete", "-namespace", "-id", "-address", "-info"] {
            assert!(HELP.contains(word), "{word}");
        }
    }
}
