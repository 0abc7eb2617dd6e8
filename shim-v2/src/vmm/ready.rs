//! [`ReadySocket`]: the one call by which a guest says that its agent serves.
//!
//! The caller's deadline is the only time limit here; the end of the VM ends the wait at once. The call is untrusted:
//! one accept, nothing is read from it.

use super::supervisor::{VmmChild, VmmExit};
use boxlite_proto::names::READY_SOCKET;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Lines of the console that an error carries.
const ERROR_LINES: usize = 30;

/// Why a VM did not get as far as its agent.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The vmm child ended first.
    #[error("the VM ended before its agent was ready ({exit}); {said}", said = said(.console, .stderr))]
    Died {
        exit: VmmExit,
        /// Last lines of the guest's console.
        console: Vec<String>,
        /// Last lines of the vmm child's standard error.
        stderr: Vec<String>,
    },
    /// The ready socket cannot be served.
    #[error("ready socket {path}")]
    Socket {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

fn said(console: &[String], stderr: &[String]) -> String {
    let part = |name: &str, lines: &[String]| match lines.is_empty() {
        true => format!("{name}: nothing"),
        false => format!("{name}: {}", lines.join(" | ")),
    };
    format!(
        "{}; {}",
        part("vmm", stderr),
        part("last console lines", console)
    )
}

/// Listens before the VM starts, so that the guest's call cannot come too early.
pub struct ReadySocket {
    listener: tokio::net::UnixListener,
    path: String,
}

impl ReadySocket {
    /// Binds [`READY_SOCKET`] in `work_dir`, over what an earlier start left there.
    ///
    /// # Errors
    /// The directory is missing or not writable.
    pub fn bind(work_dir: &Path) -> Result<Self, BootError> {
        let path = work_dir.join(READY_SOCKET);
        let failed = |source| BootError::Socket {
            path: path.display().to_string(),
            source,
        };
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed(error));
            }
            _ => {}
        }
        // A unix address holds 107 bytes, a path may be longer: go through the directory's descriptor.
        let directory = std::fs::File::open(work_dir).map_err(failed)?;
        let short = format!("/proc/self/fd/{}/{READY_SOCKET}", directory.as_raw_fd());
        let listener = tokio::net::UnixListener::bind(short).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.display().to_string(),
        })
    }

    /// Waits for the guest's call. Dropping the future leaves nothing behind but the socket file.
    ///
    /// # Errors
    /// The VM ended first; the error has its last words.
    pub async fn wait(self, child: &VmmChild) -> Result<(), BootError> {
        tokio::select! {
            accepted = self.listener.accept() => match accepted {
                Ok(_) => Ok(()),
                Err(source) => Err(BootError::Socket { path: self.path, source }),
            },
            exit = child.wait() => Err(BootError::Died {
                exit,
                console: child.console_tail(ERROR_LINES),
                stderr: child.stderr_tail(ERROR_LINES),
            }),
        }
    }
}
