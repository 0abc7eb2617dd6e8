//! [`Stdio`]: where the caller wants a process's input and output; [`Sink`]: the output's end of it, opened.
//!
//! | stdout | meaning |
//! |---|---|
//! | `cri:///path` | both streams into one file in CRI format (boxlite-cri) |
//! | `file:///path` | both streams, raw, appended to one file |
//! | `/path`, `fifo:///path` | FIFOs, one per stream (containerd) |
//! | `binary:///program?key=value` | both streams into a logging program (containerd) |
//! | empty | nothing: read and thrown away |

use super::file::{Opener, opener};
use super::program::Program;
use crate::error::{Result, ShimError};
use boxlite_proto::names::CRI_LOG_SCHEME;
use std::path::{Path, PathBuf};
use tokio::net::unix::pipe;

/// What Create and Exec say about input and output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// FIFO that input is read from; empty: none of the shim's.
    pub stdin: String,
    /// See the module.
    pub stdout: String,
    /// FIFO for stderr; ignored by the schemes that take both streams.
    pub stderr: String,
    /// One terminal instead of three streams.
    pub terminal: bool,
    /// Keep an input open in the guest though the shim feeds none: boxlite-cri's attach does.
    pub guest_input: bool,
}

impl Stdio {
    /// Whether the process gets an input at all.
    pub fn has_input(&self) -> bool {
        self.guest_input || !self.stdin.is_empty()
    }
}

/// An opened end for output.
pub enum Sink {
    /// CRI format.
    Cri(FileTarget),
    /// Raw bytes.
    Raw(FileTarget),
    /// One FIFO per stream.
    Fifos {
        /// Where stdout goes.
        stdout: Option<pipe::Sender>,
        /// Where stderr goes.
        stderr: Option<pipe::Sender>,
        /// Who reads the other ends, where the shim started it.
        program: Option<Program>,
    },
    /// Nowhere.
    Discard,
}

/// A log file by path.
pub struct FileTarget {
    /// Absolute.
    pub path: PathBuf,
    /// How it is opened, now and again.
    pub opener: Opener,
    /// The open file.
    pub file: Box<dyn super::file::LogFile>,
}

impl FileTarget {
    /// Opens a file.
    ///
    /// # Errors
    /// Io, naming the path.
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
    /// Opens what `stdio` names, for a container of `namespace`.
    ///
    /// # Errors
    /// Invalid for a scheme that is not known or a path that is not absolute, Io where it cannot be opened.
    pub async fn open(stdio: &Stdio, namespace: &str, container: &str) -> Result<Self> {
        if stdio.stdout.is_empty() && stdio.stderr.is_empty() {
            return Ok(Self::Discard);
        }
        match stdio.stdout.split_once("://") {
            Some((CRI_LOG_SCHEME, path)) => {
                Ok(Self::Cri(FileTarget::open(absolute(path)?, opener(true))?))
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

    /// Opens the path of a file that nothing was written to yet anew (rotation before the first start).
    ///
    /// # Errors
    /// Io where it cannot be opened; Invalid where it is no file.
    pub fn reopen_unused(&mut self) -> Result<()> {
        match self {
            Self::Cri(target) | Self::Raw(target) => {
                *target = FileTarget::open(&target.path, target.opener.clone())?;
                Ok(())
            }
            Self::Fifos { .. } | Self::Discard => Err(no_file()),
        }
    }
}

/// What reopening something that is no file is answered with.
pub(super) fn no_file() -> ShimError {
    ShimError::Invalid {
        field: "container_id",
        reason: "its output does not go to a file".to_owned(),
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

/// Opens a FIFO for reading and writing: it never waits for a reader, and a reader that goes breaks nothing.
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
