//! [`Stdio`]: the requested input and output of a process; [`Sink`]: the opened destination of its output.
//!
//! | stdout | meaning |
//! |---|---|
//! | `cri:///path` | both streams into one file in CRI format (boxlite-cri) |
//! | `file:///path` | both streams, raw, appended to one file |
//! | `/path`, `fifo:///path` | FIFOs, one per stream (containerd) |
//! | `binary:///program?key=value` | both streams into a logging program (containerd) |
//! | empty | none: read and discarded |

use super::file::{Opener, opener};
use super::program::Program;
use crate::error::{Result, ShimError};
use boxlite_proto::names::CRI_LOG_SCHEME;
use std::path::{Path, PathBuf};
use tokio::net::unix::pipe;

/// Input and output requested by Create or Exec.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// FIFO for input; empty if the shim feeds none.
    pub stdin: String,
    /// Destination of stdout; see the table above.
    pub stdout: String,
    /// FIFO for stderr; ignored by schemes that cover both streams.
    pub stderr: String,
    /// One terminal instead of three streams.
    pub terminal: bool,
    /// Keep stdin open in the guest although the shim feeds none, for boxlite-cri's attach.
    pub guest_input: bool,
}

impl Stdio {
    /// Returns whether the process has a stdin.
    pub fn has_input(&self) -> bool {
        self.guest_input || !self.stdin.is_empty()
    }
}

/// An opened destination of output.
pub enum Sink {
    /// CRI format.
    Cri(FileTarget),
    /// Raw bytes.
    Raw(FileTarget),
    /// CRI format for a process with a terminal.
    CriTerminal(FileTarget),
    /// One FIFO per stream.
    Fifos {
        /// Receives stdout.
        stdout: Option<pipe::Sender>,
        /// Receives stderr.
        stderr: Option<pipe::Sender>,
        /// Logging program that reads the other ends, if the shim started one.
        program: Option<Program>,
    },
    /// Output is discarded.
    Discard,
}

/// A log file that can be reopened by its path.
pub struct FileTarget {
    /// Absolute path.
    pub path: PathBuf,
    /// Opens the path, at Create and at every reopen.
    pub opener: Opener,
    /// The open file.
    pub file: Box<dyn super::file::LogFile>,
}

impl FileTarget {
    /// Opens a file.
    ///
    /// # Errors
    /// Io with the path.
    pub fn open(path: &Path, opener: Opener) -> Result<Self> {
        let file = opener(path).map_err(ShimError::io("open the log file", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            opener,
            file,
        })
    }
}

impl Sink {
    /// Opens the destination named by `stdio`, for a container of `namespace`.
    ///
    /// # Errors
    /// Invalid for an unknown scheme or a relative path, Io if it cannot be opened.
    pub async fn open(stdio: &Stdio, namespace: &str, container: &str) -> Result<Self> {
        if stdio.stdout.is_empty() && stdio.stderr.is_empty() {
            return Ok(Self::Discard);
        }
        match stdio.stdout.split_once("://") {
            Some((CRI_LOG_SCHEME, path)) => {
                let target = FileTarget::open(absolute(path)?, opener(true))?;
                Ok(match stdio.terminal {
                    true => Self::CriTerminal(target),
                    false => Self::Cri(target),
                })
            }
            Some(("file", path)) => {
                Ok(Self::Raw(FileTarget::open(absolute(path)?, opener(false))?))
            }
            Some(("binary", _)) => {
                let started = Program::start(&stdio.stdout, namespace, container).await?;
                Ok(Self::Fifos {
                    stdout: Some(started.stdout),
                    stderr: Some(started.stderr),
                    program: Some(started.program),
                })
            }
            Some(("fifo", _)) | None => Ok(Self::Fifos {
                stdout: fifo(&stdio.stdout)?,
                stderr: fifo(&stdio.stderr)?,
                program: None,
            }),
            Some((scheme, _)) => Err(ShimError::Invalid {
                field: "stdout",
                reason: format!("unknown scheme {scheme:?}"),
            }),
        }
    }

    /// Opens the path of an unused log file again (rotation before the start).
    ///
    /// # Errors
    /// Io if it cannot be opened; Invalid if output is not written to a file.
    pub fn reopen_unused(&mut self) -> Result<()> {
        match self {
            Self::Cri(target) | Self::CriTerminal(target) | Self::Raw(target) => {
                *target = FileTarget::open(&target.path, target.opener.clone())?;
                Ok(())
            }
            Self::Fifos { .. } | Self::Discard => Err(no_file()),
        }
    }
}

/// Returns the error of a reopen of output that is not written to a file.
pub(super) fn no_file() -> ShimError {
    ShimError::Invalid {
        field: "container_id",
        reason: "its output is not written to a file".to_owned(),
    }
}

fn absolute(path: &str) -> Result<&Path> {
    let path = Path::new(path);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(ShimError::Invalid {
        field: "stdout",
        reason: format!("path {path:?} is not absolute"),
    })
}

/// Opens a FIFO for reading and writing, so that the open does not block and a disconnecting reader causes no EPIPE.
fn fifo(uri: &str) -> Result<Option<pipe::Sender>> {
    if uri.is_empty() {
        return Ok(None);
    }
    let path = absolute(uri.strip_prefix("fifo://").unwrap_or(uri))?;
    pipe::OpenOptions::new()
        .read_write(true)
        .open_sender(path)
        .map(Some)
        .map_err(ShimError::io("open the FIFO", path.display()))
}
