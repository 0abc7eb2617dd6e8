//! The command line as containerd calls a shim: Go-style flags, then `start`, `delete`, or nothing (the daemon itself).
//!
//! Chooses and reports; the actions are in the sibling modules. The roles `vmm` and `probe` never get here.
//!
//! ```text
//! start   → bind socket, spawn the daemon, wait for its word, print the answer
//! delete  → after a crash: kill what is left, clean up, print a DeleteResponse
//! (none)  → the daemon, until ShutdownSandbox or Shutdown
//! ```

pub mod bootstrap;
pub mod delete;
pub mod start;

use boxlite_proto::exit::ExitCode;
use boxlite_sys::report::Report;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use std::ffi::OsString;
use std::io::Write;

/// The runtime's name as containerd knows it.
pub const RUNTIME_NAME: &str = "io.containerd.boxlite.v2";

/// Why an action of the command line failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Flags that cannot be understood, or that an action needs and did not get.
    #[error("command line: {reason}")]
    Arguments { reason: String },
    /// A file or socket operation.
    #[error("{action} {path}")]
    Io {
        action: &'static str,
        path: String,
        #[source]
        source: std::io::Error,
    },
    /// containerd's message on standard input.
    #[error("bootstrap input: {reason}")]
    Bootstrap { reason: String },
    /// The daemon ended, or stayed silent, before it served.
    #[error("the shim daemon did not come up: {reason}")]
    Daemon { reason: String },
    /// A daemon serves this id already, but its bundle is another.
    #[error("a shim already serves {address}")]
    Busy { address: String },
    /// An answer could not be encoded.
    #[error("cannot encode the answer")]
    Encode(#[source] containerd_shim_protos::protobuf::Error),
    /// The daemon failed.
    #[error(transparent)]
    Serve(#[from] crate::daemon::DaemonError),
}

impl CliError {
    /// Wraps an I/O error with what was done to which path.
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
            Self::Io { .. }
            | Self::Daemon { .. }
            | Self::Busy { .. }
            | Self::Encode(_)
            | Self::Serve(_) => ExitCode::Failure,
        }
    }
}

/// Runs the shim protocol's command line and gives the process's exit code. Errors go to standard error, which
/// containerd and boxlite-cri put into theirs.
pub fn main(args: &[OsString]) -> std::process::ExitCode {
    match run(args) {
        Ok(()) => ExitCode::Ok.into(),
        Err(error) => {
            eprintln!("containerd-shim-boxlite-v2: {}", Report(&error));
            error.exit_code().into()
        }
    }
}

fn run(args: &[OsString]) -> Result<(), CliError> {
    let flags = containerd_shim::parse(args).map_err(|error| CliError::Arguments {
        reason: error.to_string(),
    })?;
    if flags.version {
        println!("containerd-shim-boxlite-v2 {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    if flags.info {
        return print_info();
    }
    if flags.id.is_empty() || flags.namespace.is_empty() {
        return Err(CliError::Arguments {
            reason: "-id and -namespace are needed".to_owned(),
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

/// `-info`: what containerd asks before any shim exists.
fn print_info() -> Result<(), CliError> {
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    write_stdout(&info.write_to_bytes().map_err(CliError::Encode)?)
}

/// Writes an answer and flushes it: containerd reads until end of file.
pub(crate) fn write_stdout(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(CliError::io("write", "standard output"))
}
