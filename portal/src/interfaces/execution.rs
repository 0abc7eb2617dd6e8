//! [`ExecutionInterface`]: the Execution service: processes of containers, their output, input and exits; and
//! [`ExecutionInterface::exec_sync`], which runs a command to completion.
//!
//! [`super::follow`] follows output across reconnects.

use super::follow::OutputFollower;
use super::{LONG_CALL_TIMEOUT, QUICK_CALL_TIMEOUT, unary};
use crate::connection::Connection;
use crate::error::PortalError;
use boxlite_proto::boxlite::v1::execution_client::ExecutionClient;
use boxlite_proto::boxlite::v1::{
    AckRequest, AttachChunk, AttachRequest, ExecDeleteRequest, ExecRequest, Exit, KillRequest,
    OutputStream, ResizeTtyRequest, SendInputRequest, WaitRequest,
};
use boxlite_proto::names;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tonic::Streaming;
use tonic::transport::Channel;

/// Time limit for output after an exec'd process ended: its last chunks are in flight, and a child that inherited the
/// pipe may never end.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for the exit of a process tree after SIGKILL; later the agent's Delete reaps it.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Default limit of stdout and of stderr of exec_sync, in bytes (the kubelet's limit is 16 MiB for both).
pub const MAX_EXEC_OUTPUT_BYTES: usize = 16 << 20;

/// Result of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output, at most the caller's limit.
    pub stdout: Vec<u8>,
    /// Standard error, at most the caller's limit.
    pub stderr: Vec<u8>,
    /// Exit code 0–255; 128 + signal if killed by a signal.
    pub exit_code: i32,
    /// True if output beyond the limit was discarded.
    pub truncated: bool,
}

/// Typed client of the Execution service.
#[derive(Debug, Clone)]
pub struct ExecutionInterface {
    connection: Connection,
    client: ExecutionClient<Channel>,
    bytes: Arc<AtomicU64>,
}

impl ExecutionInterface {
    pub(crate) fn new(connection: Connection, bytes: Arc<AtomicU64>) -> Self {
        let client = ExecutionClient::new(connection.channel())
            .max_decoding_message_size(names::MAX_GUEST_MESSAGE_BYTES)
            .max_encoding_message_size(names::MAX_GUEST_MESSAGE_BYTES);
        Self {
            connection,
            client,
            bytes,
        }
    }

    /// Starts a process in a container. A repeated `exec_id` refers to the running process. Returns the guest pid.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn exec(&self, request: ExecRequest) -> Result<u32, PortalError> {
        let response = unary(
            "Execution.Exec",
            LONG_CALL_TIMEOUT,
            self.client.clone().exec(request),
        )
        .await?;
        Ok(response.pid)
    }

    /// Opens an output stream without a deadline, which ends when the caller drops it. [`Self::follow`] survives
    /// reconnects.
    ///
    /// # Errors
    /// Every kind of [`PortalError`] when opening; Status items later.
    pub async fn attach(
        &self,
        request: AttachRequest,
    ) -> Result<Streaming<AttachChunk>, PortalError> {
        unary(
            "Execution.Attach",
            QUICK_CALL_TIMEOUT,
            self.client.clone().attach(request),
        )
        .await
    }

    /// Follows the output of a process from `offset` across reconnects, each byte once. `exec_id` is empty for the init
    /// process.
    pub fn follow(&self, container_id: &str, exec_id: &str, offset: u64) -> OutputFollower {
        OutputFollower::new(self.clone(), container_id, exec_id, offset)
    }

    /// Frees output below `offset` in the guest.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn ack(
        &self,
        container_id: &str,
        exec_id: &str,
        offset: u64,
    ) -> Result<(), PortalError> {
        let request = AckRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            offset,
        };
        unary(
            "Execution.Ack",
            QUICK_CALL_TIMEOUT,
            self.client.clone().ack(request),
        )
        .await?;
        Ok(())
    }

    /// Sends input until `incoming` ends. Returns the number of bytes written to the process's pipe. The first message
    /// identifies the process. Without a deadline: a process that does not read blocks the stream; dropping the future
    /// ends it.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn send_input<S>(&self, incoming: S) -> Result<u64, PortalError>
    where
        S: futures::Stream<Item = SendInputRequest> + Send + 'static,
    {
        let bytes = self.bytes.clone();
        let counted = futures::StreamExt::inspect(incoming, move |message: &SendInputRequest| {
            bytes.fetch_add(message.data.len() as u64, Ordering::Relaxed);
        });
        match self.client.clone().send_input(counted).await {
            Ok(response) => Ok(response.into_inner().accepted),
            Err(status) => Err(PortalError::from_status("Execution.SendInput", status)),
        }
    }

    /// Waits for the exit of a process without a deadline: returns with the process, the connection, or the caller. The time of
    /// the exit is converted to the host's clock.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn wait(&self, container_id: &str, exec_id: &str) -> Result<Exit, PortalError> {
        let call = "Execution.Wait";
        let request = WaitRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        let response = self.client.clone().wait(request).await;
        let response = response.map_err(|status| PortalError::from_status(call, status))?;
        let response = response.into_inner();
        let guest_now = response.guest_time_unix_ns;
        let mut exit = response.exit.ok_or_else(|| PortalError::Protocol {
            call,
            what: "an answer without exit".into(),
        })?;
        exit.finished_at_unix_ns = host_time(
            exit.finished_at_unix_ns,
            guest_now,
            boxlite_sys::clock::unix_ns(),
        );
        Ok(exit)
    }

    /// Signals an exec'd process; with `all` also its descendants. `signal` is the Linux number.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn kill(
        &self,
        container_id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), PortalError> {
        let request = KillRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
        };
        unary(
            "Execution.Kill",
            QUICK_CALL_TIMEOUT,
            self.client.clone().kill(request),
        )
        .await?;
        Ok(())
    }

    /// Resizes a process's terminal, in characters.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn resize_tty(
        &self,
        container_id: &str,
        exec_id: &str,
        rows: u32,
        cols: u32,
    ) -> Result<(), PortalError> {
        let request = ResizeTtyRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            rows,
            cols,
        };
        unary(
            "Execution.ResizeTty",
            QUICK_CALL_TIMEOUT,
            self.client.clone().resize_tty(request),
        )
        .await?;
        Ok(())
    }

    /// Removes an exec'd process that ended. Succeeds if it does not exist.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn delete(&self, container_id: &str, exec_id: &str) -> Result<(), PortalError> {
        let request = ExecDeleteRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
        };
        unary(
            "Execution.Delete",
            QUICK_CALL_TIMEOUT,
            self.client.clone().delete(request),
        )
        .await?;
        Ok(())
    }

    /// Runs a command to completion and collects its output.
    ///
    /// Ends early when `limit` expires or `cancelled` resolves; the process and its descendants are then killed. In
    /// every case the guest has removed the process before this returns. The future must be polled to completion:
    /// dropping it leaves the process running, which is why disconnected callers are reported through `cancelled`.
    ///
    /// # Errors
    /// [`PortalError::ExecDeadline`] if `limit` expired or `cancelled` resolved; otherwise every kind of
    /// [`PortalError`].
    pub async fn exec_sync(
        &self,
        request: ExecRequest,
        limit: Option<Duration>,
        output_limit: usize,
        cancelled: impl Future<Output = ()>,
    ) -> Result<ExecOutput, PortalError> {
        let container = request.container_id.clone();
        let exec = request.exec_id.clone();
        let timer = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        let result = tokio::select! {
            result = self.exec_and_collect(request, output_limit) => result,
            () = timer => Err(self.kill_tree(&container, &exec, limit).await),
            () = cancelled => Err(self.kill_tree(&container, &exec, limit).await),
        };
        if let Err(error) = self.delete(&container, &exec).await {
            tracing::debug!(container, exec, %error, "failed to forget exec'd process");
        }
        result
    }

    async fn exec_and_collect(
        &self,
        request: ExecRequest,
        output_limit: usize,
    ) -> Result<ExecOutput, PortalError> {
        let container = request.container_id.clone();
        let exec = request.exec_id.clone();
        self.exec(request).await?;
        let mut output = ExecOutput::default();
        let exit = {
            let collecting = self.collect(&container, &exec, output_limit, &mut output);
            tokio::pin!(collecting);
            let waiting = self.wait(&container, &exec);
            tokio::pin!(waiting);
            tokio::select! {
                collected = &mut collecting => {
                    collected?;
                    waiting.await?
                }
                exit = &mut waiting => {
                    let exit = exit?;
                    // A child that keeps the pipe open must not delay the answer forever.
                    if let Ok(collected) = tokio::time::timeout(DRAIN_TIMEOUT, &mut collecting).await {
                        collected?;
                    }
                    exit
                }
            }
        };
        output.exit_code = i32::try_from(exit.code.min(255)).unwrap_or(255);
        Ok(output)
    }

    async fn collect(
        &self,
        container: &str,
        exec: &str,
        limit: usize,
        output: &mut ExecOutput,
    ) -> Result<(), PortalError> {
        let mut follower = self.follow(container, exec, 0).shared();
        let mut acks = FuturesUnordered::new();
        loop {
            let chunk = tokio::select! {
                chunk = follower.next() => chunk?,
                // The next Ack replaces one lost with its connection.
                Some(_) = acks.next() => continue,
            };
            let Some(chunk) = chunk else { return Ok(()) };
            let buffer = match chunk.stream {
                OutputStream::Stderr => &mut output.stderr,
                _ => &mut output.stdout,
            };
            let room = limit.saturating_sub(buffer.len());
            let taken = chunk.data.len().min(room);
            buffer.extend_from_slice(&chunk.data[..taken]);
            output.truncated |= taken < chunk.data.len();
            acks.extend(follower.due_ack());
        }
    }

    /// Kills the process tree, waits briefly for its exit, and returns the resulting error.
    async fn kill_tree(&self, container: &str, exec: &str, limit: Option<Duration>) -> PortalError {
        const SIGKILL: u32 = 9;
        if let Err(error) = self.kill(container, exec, SIGKILL, true).await
            && !error.is_not_found()
        {
            tracing::warn!(container, exec, %error, "failed to kill process tree after its timeout");
        }
        match tokio::time::timeout(KILL_TIMEOUT, self.wait(container, exec)).await {
            Ok(_) => {}
            Err(_) => tracing::warn!(
                container,
                exec,
                timeout = ?KILL_TIMEOUT,
                "killed process did not end in time"
            ),
        }
        PortalError::ExecDeadline {
            what: format!("process {exec} of container {container}"),
            limit: limit.unwrap_or_default(),
        }
    }

    /// Adds streamed payload to the counter.
    pub(super) fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns true if the session's owner knows that the VM has ended.
    pub(super) fn is_severed(&self) -> bool {
        self.connection.is_severed()
    }

    /// Waits for `pause`, or until the session is severed.
    pub(super) async fn pause(&self, pause: Duration) {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.connection.severed() => {}
        }
    }

    /// Returns the same client on a dedicated connection.
    pub(super) fn dedicated(&self) -> Self {
        Self::new(self.connection.dedicated(), self.bytes.clone())
    }
}

/// Converts a time of the guest's clock to the host's: that clock is set at boot, drifts, and a privileged container can set it.
/// What remains is the latency of the answer, so the result is never before the event.
fn host_time(at_ns: i64, guest_now_ns: i64, host_now_ns: i64) -> i64 {
    let age = guest_now_ns.saturating_sub(at_ns).max(0);
    host_now_ns.saturating_sub(age)
}

#[cfg(test)]
mod tests {
    use super::host_time;

    #[test]
    fn exit_time_of_a_wrong_guest_clock_is_the_hosts() {
        const HOST_NOW: i64 = 1_800_000_000_000_000_000;
        for (at, guest_now, age) in [
            (HOST_NOW - 5_300, HOST_NOW - 5_000, 300),
            (1_000_000, 1_000_300, 300),
            (0, 0, 0),
            // Set back after the exit.
            (HOST_NOW, 1_000, 0),
            (i64::MIN, i64::MAX, i64::MAX),
        ] {
            assert_eq!(
                host_time(at, guest_now, HOST_NOW),
                HOST_NOW - age,
                "{at} {guest_now}"
            );
        }
    }
}
