//! Interactive sessions of a [`LiteBox`]: processes with their streams ([`ProcessSession`], for exec and attach) and byte
//! streams to ports inside the VM ([`LiteBox::port_forward`]).
//!
//! Changes no state of the box. Each session has a dedicated connection for its streams, so a stalled session does not
//! block others; control calls (kill, delete, acknowledgments) use the box's shared connection. The client side is in
//! cri-server's `streaming`.

use super::LiteBox;
use crate::error::{Result, RuntimeError};
use crate::types::ContainerState;
use boxlite_portal::{ExecutionInterface, OutputFollower, PortalError};
use boxlite_proto::boxlite::v1::{Exit, PortForwardRequest, PortForwardResponse, SendInputRequest};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use std::time::Duration;
use tonic::Streaming;

/// Timeout for the exit of a process tree after SIGKILL; the agent reaps it whenever it exits.
const KILL_WAIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Time that processes have to exit after SIGHUP when their terminal is closed.
const HANGUP_TIMEOUT: Duration = Duration::from_secs(2);
const SIGHUP: u32 = 1;
const SIGKILL: u32 = 9;

/// A process of a container and its streams. Dropping it does not end an exec'd process: call [`ProcessSession::end`].
#[derive(Debug)]
pub struct ProcessSession {
    /// Shared connection.
    calls: ExecutionInterface,
    /// Dedicated connection.
    streams: ExecutionInterface,
    container: String,
    /// Empty for the container's init process.
    exec: String,
    terminal: bool,
    output: OutputFollower,
}

impl LiteBox {
    /// Starts a process in a running container. Not cancel-safe: dropping the future may leave the process running.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState`, `BoxGone`, `Portal` if the guest cannot start it.
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
        if let Err(error) = calls.exec(request).await {
            let action = format!("run a command in container {id:?}");
            return Err(self.guest_error(action, error).await);
        }
        Ok(ProcessSession {
            output: calls.follow(id, &exec, 0).over(&streams),
            calls,
            streams,
            container: id.to_owned(),
            exec,
            terminal,
        })
    }

    /// Attaches to a running container's init process: reads its output from now on and writes its input.
    ///
    /// # Errors
    /// `NotFound`, `ContainerState`, `BoxGone`, `Portal`.
    pub async fn attach_session(&self, id: &str) -> Result<ProcessSession> {
        let container = self.exact(id)?;
        if container.state != ContainerState::Running {
            return Err(RuntimeError::ContainerState {
                id: id.to_owned(),
                state: container.state,
                reason: "attach needs a running container",
            });
        }
        let session = self.portal()?;
        let (calls, streams) = (session.execution(), session.dedicated().execution());
        let mut output = calls.follow(id, "", 0).over(&streams).observing(true);
        if let Err(error) = output.open().await {
            let action = format!("attach to container {id:?}");
            return Err(self.guest_error(action, error).await);
        }
        Ok(ProcessSession {
            output,
            calls,
            streams,
            container: id.to_owned(),
            exec: String::new(),
            terminal: container.tty,
        })
    }

    /// Opens a byte stream to a port inside the VM over a dedicated connection. `outgoing` carries the client's bytes,
    /// and its end is the client's half-close; `eof` in the response is the server's. Ends when either side drops.
    ///
    /// # Errors
    /// `BoxGone`, `Portal` if the port refuses the connection.
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
    /// Returns the output: the whole output of an exec'd process, or a container's output since the attach.
    pub fn output(&mut self) -> &mut OutputFollower {
        &mut self.output
    }

    /// Returns a handle for input and terminal size that can be used while the output is read.
    pub fn controls(&self) -> ProcessControls {
        ProcessControls {
            calls: self.calls.clone(),
            streams: self.streams.clone(),
            container: self.container.clone(),
            exec: self.exec.clone(),
        }
    }

    /// Waits for the process to exit, without a timeout.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn wait(&self) -> std::result::Result<Exit, PortalError> {
        self.streams.wait(&self.container, &self.exec).await
    }

    /// Ends an exec'd process: if `kill` is set, kills it and its descendants (after SIGHUP if it has a terminal); then
    /// deletes it in the guest. Does nothing for a container's init process.
    pub async fn end(self, kill: bool) {
        if self.exec.is_empty() {
            return;
        }
        if kill {
            self.kill().await;
        }
        if let Err(error) = self.calls.delete(&self.container, &self.exec).await {
            tracing::debug!(container = self.container, exec = self.exec, %error, "failed to delete exec'd process");
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
            if ended(HANGUP_TIMEOUT).await {
                return;
            }
        }
        if let Err(error) = self
            .calls
            .kill(&self.container, &self.exec, SIGKILL, true)
            .await
            && !error.is_not_found()
        {
            tracing::warn!(container = self.container, exec = self.exec, %error, "failed to kill the process of a disconnected client");
        }
        if !ended(KILL_WAIT_TIMEOUT).await {
            tracing::warn!(
                container = self.container,
                exec = self.exec,
                timeout = ?KILL_WAIT_TIMEOUT,
                "killed process did not exit in time"
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
    /// Writes `incoming` to the input. Its end closes the input of an exec'd process, and that of a container's init
    /// process with stdin_once. Returns once the guest has accepted everything; blocks while the process does not read,
    /// so callers must be ready to drop the future.
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

    /// Resizes the terminal, in characters.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn resize(&self, rows: u16, columns: u16) -> std::result::Result<(), PortalError> {
        self.calls
            .resize_tty(&self.container, &self.exec, rows.into(), columns.into())
            .await
    }
}
