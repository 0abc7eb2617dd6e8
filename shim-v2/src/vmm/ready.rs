//! [`ReadySocket`]: receives the guest's connection that reports its agent ready.
//!
//! The caller's deadline is the only timeout; the end of the VM ends the wait at once. The connection is untrusted: it is
//! accepted and nothing is read from it.

use super::supervisor::{VmmChild, VmmExit};
use boxlite_proto::names::READY_SOCKET;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Number of console lines in an error.
const ERROR_LINES: usize = 30;

/// Error while waiting for the agent.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The vmm child exited first.
    #[error("the VM ended before its agent was ready ({exit}); {output}", output = output(.console, .stderr))]
    Died {
        exit: VmmExit,
        /// Last lines of the guest's console.
        console: Vec<String>,
        /// Last lines of the vmm child's standard error.
        stderr: Vec<String>,
    },
    /// The ready socket failed.
    #[error("failed to listen on ready socket {path}")]
    Socket {
        path: String,
        #[source]
        source: std::io::Error,
    },
}

/// Returns the last lines of the guest's console and of the vmm child's standard error for an error's text.
fn output(console: &[String], stderr: &[String]) -> String {
    let parts = [("vmm", stderr), ("last console lines", console)];
    let parts = parts.into_iter().filter(|(_, lines)| !lines.is_empty());
    let parts: Vec<_> = parts
        .map(|(name, lines)| format!("{name}: {}", lines.join(" | ")))
        .collect();
    match parts.is_empty() {
        true => "no output".to_owned(),
        false => parts.join("; "),
    }
}

/// Returns the last output of a VM and its vmm child for an error's text.
pub(crate) fn last_output(child: &VmmChild) -> String {
    output(
        &child.console_tail(ERROR_LINES),
        &child.stderr_tail(ERROR_LINES),
    )
}

/// The listening socket. It is bound before the VM starts, so that the guest cannot connect too early.
pub struct ReadySocket {
    listener: tokio::net::UnixListener,
    path: String,
}

impl ReadySocket {
    /// Binds [`READY_SOCKET`] in `work_dir`, replacing the socket of an earlier start.
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
        // A unix socket address holds 107 bytes and the path may be longer, so it is bound through a descriptor of its directory.
        let directory = std::fs::File::open(work_dir).map_err(failed)?;
        let short = format!("/proc/self/fd/{}/{READY_SOCKET}", directory.as_raw_fd());
        let listener = tokio::net::UnixListener::bind(short).map_err(failed)?;
        Ok(Self {
            listener,
            path: path.display().to_string(),
        })
    }

    /// Waits for the guest's connection. Dropping the future leaves only the socket file.
    ///
    /// # Errors
    /// The VM ended first; the error contains its last output.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_names_only_parts_with_lines() {
        let lines = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(output(&[], &[]), "no output");
        assert_eq!(output(&lines("a b"), &[]), "last console lines: a | b");
        assert_eq!(
            output(&lines("a"), &lines("x y")),
            "vmm: x | y; last console lines: a"
        );
    }
}
