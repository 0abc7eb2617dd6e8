//! What a [`LiteBox`] offers to interactive clients: a process with its streams ([`ProcessSession`], for exec and
//! attach) and byte streams to ports inside the VM ([`LiteBox::port_forward`]).
//!
//! Changes no state of the box. Each session's streams have a connection of their own, so that one that stalls holds
//! back nobody else; calls that must get through (kill, delete, acknowledgements) go over the box's common one. Who the
//! client is, and what it is told, is cri-server's `streaming`.

use super::LiteBox;
use crate::error::Result;
use crate::types::ContainerState;
use boxlite_portal::{ExecutionInterface, OutputFollower, PortalError};
use boxlite_proto::boxlite::v1::{Exit, PortForwardRequest, PortForwardResponse, SendInputRequest};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use std::time::Duration;
use tonic::Streaming;

/// Wait for the end of a process tree that got SIGKILL; the agent reaps it whenever it ends.
const KILLED_LIMIT: Duration = Duration::from_secs(10);
/// What a hung-up terminal's processes have to end by themselves.
const HANGUP_LIMIT: Duration = Duration::from_secs(2);
const SIGHUP: u32 = 1;
const SIGKILL: u32 = 9;

/// A process of a container and its streams. Dropped, it leaves an exec'd process as it is: call
/// [`ProcessSession::end`].
#[derive(Debug)]
pub struct ProcessSession {
    /// The common connection.
    calls: ExecutionInterface,
    /// This session's own.
    streams: ExecutionInterface,
    container: String,
    /// Empty for the container's init process.
    exec: String,
    terminal: bool,
    output: OutputFollower,
}

impl LiteBox {
    /// Starts a process in a running container. Dropping the future may leave it running: drive it to its end.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState`, `BoxGone`, `Portal`: the guest cannot start it.
    pub async fn exec_session(
        &self,
        id: &str,
        argv: &[String],
        terminal: bool,
        stdin: bool,
    ) -> Result<ProcessSession> {
        let process = serde_json::json!({ "args": argv });
        let request = self.exec_request(id, &process, terminal, stdin)?;
        let session = self.portal()?;
        let (calls, streams) = (session.execution(), session.dedicated().execution());
        let exec = request.exec_id.clone();
        calls.exec(request).await?;
        Ok(ProcessSession {
            output: calls.follow(id, &exec, 0).over(&streams),
            calls,
            streams,
            container: id.to_owned(),
            exec,
            terminal,
        })
    }

    /// Joins a running container's own process as one more reader of its output from now on, and writer of its input.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState`, `BoxGone`, `Portal`.
    pub async fn attach_session(&self, id: &str) -> Result<ProcessSession> {
        let container = self.exact(id)?;
        if container.state != ContainerState::Running {
            return Err(crate::error::RuntimeError::ContainerState {
                id: id.to_owned(),
                state: container.state,
                reason: "only a running container can be attached to",
            });
        }
        let session = self.portal()?;
        let (calls, streams) = (session.execution(), session.dedicated().execution());
        let mut output = calls.follow(id, "", 0).over(&streams).observing(true);
        output.open().await?;
        Ok(ProcessSession {
            output,
            calls,
            streams,
            container: id.to_owned(),
            exec: String::new(),
            terminal: container.tty,
        })
    }

    /// Opens a byte stream to a port inside the VM, over a connection of its own. `outgoing` is what the client sends,
    /// its end the client's half-close; the answer's `eof` is the server's. Ends when either side drops.
    ///
    /// # Errors
    /// `BoxGone`, `Portal`: nothing listens there.
    pub async fn port_forward(
        &self,
        port: u16,
        outgoing: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<Streaming<PortForwardResponse>> {
        let guest = self.portal()?.dedicated().guest();
        let first = PortForwardRequest {
            port: port.into(),
            ..Default::default()
        };
        let last = PortForwardRequest {
            eof: true,
            ..Default::default()
        };
        let data = outgoing.map(|data| PortForwardRequest {
            data,
            ..Default::default()
        });
        let requests = futures::stream::iter([first])
            .chain(data)
            .chain(futures::stream::iter([last]));
        Ok(guest.port_forward(requests).await?)
    }
}

impl ProcessSession {
    /// Its output: all of an exec'd process's, a container's from the moment of attaching.
    pub fn output(&mut self) -> &mut OutputFollower {
        &mut self.output
    }

    /// The ways to its input and terminal; usable while its output is read.
    pub fn controls(&self) -> ProcessControls {
        ProcessControls {
            calls: self.calls.clone(),
            streams: self.streams.clone(),
            container: self.container.clone(),
            exec: self.exec.clone(),
        }
    }

    /// Waits for its end; no limit but the caller's.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn wait(&self) -> std::result::Result<Exit, PortalError> {
        self.streams.wait(&self.container, &self.exec).await
    }

    /// Ends an exec'd process: kills it with all it started where `kill` says so (a terminal's is hung up first), and has
    /// the guest forget it. Nothing of a container's own process.
    pub async fn end(self, kill: bool) {
        if self.exec.is_empty() {
            return;
        }
        if kill {
            self.kill().await;
        }
        if let Err(error) = self.calls.delete(&self.container, &self.exec).await {
            tracing::debug!(container = self.container, exec = self.exec, %error, "exec'd process could not be forgotten");
        }
    }

    async fn kill(&self) {
        let ended = |limit| {
            let waiting = self.calls.wait(&self.container, &self.exec);
            async move { tokio::time::timeout(limit, waiting).await.is_ok() }
        };
        if self.terminal {
            let _ = self
                .calls
                .kill(&self.container, &self.exec, SIGHUP, false)
                .await;
            if ended(HANGUP_LIMIT).await {
                return;
            }
        }
        if let Err(error) = self
            .calls
            .kill(&self.container, &self.exec, SIGKILL, true)
            .await
            && !error.is_not_found()
        {
            tracing::warn!(container = self.container, exec = self.exec, %error, "process of a client that is gone could not be killed");
        }
        if !ended(KILLED_LIMIT).await {
            tracing::warn!(
                container = self.container,
                exec = self.exec,
                "killed process did not end within {KILLED_LIMIT:?}"
            );
        }
    }
}

/// Input and terminal of a [`ProcessSession`].
#[derive(Debug, Clone)]
pub struct ProcessControls {
    calls: ExecutionInterface,
    streams: ExecutionInterface,
    container: String,
    exec: String,
}

impl ProcessControls {
    /// Writes `incoming` to the input; its end closes the input of an exec'd process, and of a container's own where it
    /// was made so (stdin_once). Returns when the guest has taken everything: a process that does not read holds it for
    /// ever, so drop it then.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn send_input(
        &self,
        incoming: impl Stream<Item = Bytes> + Send + 'static,
    ) -> std::result::Result<u64, PortalError> {
        let message = SendInputRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            writer: hex::encode(rand::random::<[u8; 8]>()),
            ..Default::default()
        };
        let end = futures::stream::once(std::future::ready(None));
        let messages = incoming.map(Some).chain(end).scan(0, move |offset, data| {
            let eof = data.is_none();
            let data = data.unwrap_or_default();
            let at = *offset;
            *offset += data.len() as u64;
            std::future::ready(Some(SendInputRequest {
                offset: at,
                data,
                eof,
                ..message.clone()
            }))
        });
        self.streams.send_input(messages).await
    }

    /// New size of the terminal, in characters.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn resize(&self, rows: u16, columns: u16) -> std::result::Result<(), PortalError> {
        self.calls
            .resize_tty(&self.container, &self.exec, rows.into(), columns.into())
            .await
    }
}
