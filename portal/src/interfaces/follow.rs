//! [`OutputFollower`]: output of a process from an offset, each byte once, across broken connections.
//!
//! The caller decides the destination of the output and when it may be freed (Ack): the shim's log writer acknowledges
//! data on disk, exec_sync data in memory. Output is not skipped: a gap is a protocol error, OUTPUT_GONE an error of
//! the guest.

use super::execution::ExecutionInterface;
use crate::error::PortalError;
use boxlite_proto::boxlite::v1::{AttachChunk, AttachRequest, OutputStream};
use boxlite_proto::names::MAX_CHUNK_BYTES;
use bytes::Bytes;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Streaming;

/// Time limit for reconnecting to a guest. The end of a VM is noticed earlier by its owner, who severs the session.
pub const RECONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Initial pause between two attempts; doubled up to [`MAX_RECONNECT_DELAY`].
const MIN_RECONNECT_DELAY: Duration = Duration::from_millis(50);
/// Maximum pause between two attempts.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(1);
/// Number of bytes after which [`OutputFollower::ack_if_due`] acknowledges: often enough that the guest's buffer never
/// fills for a reader that keeps up.
const ACK_BYTES: u64 = 256 << 10;

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputChunk {
    /// Offset of the first byte of `data`, counted over both streams.
    pub offset: u64,
    /// Stream of the data.
    pub stream: OutputStream,
    /// At most [`MAX_CHUNK_BYTES`] bytes, never empty.
    pub data: Bytes,
}

/// Reader of a process's output, created by [`ExecutionInterface::follow`].
#[derive(Debug)]
pub struct OutputFollower {
    /// Client for calls.
    execution: ExecutionInterface,
    /// Client for the stream. Uses a dedicated connection unless [`OutputFollower::shared`], since a reader that waits
    /// for an Ack while its unread stream fills the shared window would wait forever.
    streaming: ExecutionInterface,
    request: AttachRequest,
    /// Offset of the next byte to read.
    next: u64,
    acked: u64,
    stream: Option<Streaming<AttachChunk>>,
    done: bool,
}

impl OutputFollower {
    pub(super) fn new(
        execution: ExecutionInterface,
        container_id: &str,
        exec_id: &str,
        offset: u64,
    ) -> Self {
        Self {
            streaming: execution.dedicated(),
            execution,
            request: AttachRequest {
                container_id: container_id.to_owned(),
                exec_id: exec_id.to_owned(),
                offset,
                from_end: false,
                observer: false,
            },
            next: offset,
            acked: offset,
            stream: None,
            done: false,
        }
    }

    /// Turns this into an observer, which never acknowledges and does not block the process: if it is too slow, it ends
    /// with OUTPUT_GONE. With `from_end` it starts at the current end.
    #[must_use]
    pub fn observing(mut self, from_end: bool) -> Self {
        self.request.observer = true;
        self.request.from_end = from_end;
        self
    }

    /// Reads over the connection of `streaming`. Its owner must not share it with calls that must not block.
    #[must_use]
    pub fn over(mut self, streaming: &ExecutionInterface) -> Self {
        self.streaming = streaming.clone();
        self
    }

    /// Opens the stream now instead of at the first [`Self::next`], so that an observer sees all later output.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn open(&mut self) -> Result<(), PortalError> {
        if self.stream.is_none() {
            self.stream = Some(self.streaming.attach(self.request.clone()).await?);
        }
        Ok(())
    }

    /// Reads over the shared connection. Only for a reader that never pauses, not even during an Ack.
    pub(super) fn shared(mut self) -> Self {
        self.streaming = self.execution.clone();
        self
    }

    /// Returns the offset of the next byte that [`Self::next`] returns.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// Returns the next piece of output, or `None` at the end. Cancel-safe.
    ///
    /// # Errors
    /// An error of the guest immediately; `Transport` after [`RECONNECT_TIMEOUT`] without a connection, or once the session
    /// is severed; `Protocol` on a gap or an oversized chunk.
    pub async fn next(&mut self) -> Result<Option<OutputChunk>, PortalError> {
        let mut broken_since: Option<Instant> = None;
        let mut pause = MIN_RECONNECT_DELAY;
        loop {
            if self.done {
                return Ok(None);
            }
            match self.step().await {
                Ok(Some(chunk)) => {
                    if let Some(chunk) = self.accept(chunk)? {
                        self.execution.count(chunk.data.len());
                        return Ok(Some(chunk));
                    }
                    broken_since = None;
                }
                Ok(None) => {
                    // The stream ended without `eof`: the agent closed it, so reopen it.
                    self.stream = None;
                    let since = *broken_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > RECONNECT_TIMEOUT {
                        return Err(self.protocol("output ends again and again without eof".into()));
                    }
                    self.streaming.pause(pause).await;
                    pause = (pause * 2).min(MAX_RECONNECT_DELAY);
                }
                Err(error) if error.is_transport() => {
                    self.stream = None;
                    let since = *broken_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > RECONNECT_TIMEOUT || self.streaming.is_severed() {
                        return Err(error);
                    }
                    tracing::debug!(offset = self.next, %error, "output stream broke, reconnecting");
                    self.streaming.pause(pause).await;
                    pause = (pause * 2).min(MAX_RECONNECT_DELAY);
                }
                Err(error) => {
                    self.stream = None;
                    return Err(error);
                }
            }
        }
    }

    async fn step(&mut self) -> Result<Option<AttachChunk>, PortalError> {
        if self.stream.is_none() {
            self.request.offset = self.next;
            self.stream = Some(self.streaming.attach(self.request.clone()).await?);
        }
        let Some(stream) = self.stream.as_mut() else {
            return Ok(None);
        };
        stream
            .message()
            .await
            .map_err(|status| PortalError::from_status("Execution.Attach", status))
    }

    /// Checks a chunk against the position. Returns `None` if it contains nothing new.
    fn accept(&mut self, chunk: AttachChunk) -> Result<Option<OutputChunk>, PortalError> {
        if chunk.data.len() > MAX_CHUNK_BYTES {
            return Err(self.protocol(format!("a chunk of {} bytes", chunk.data.len())));
        }
        if self.request.from_end {
            self.next = chunk.offset;
            self.acked = chunk.offset;
            self.request.from_end = false;
        }
        if chunk.offset > self.next {
            return Err(self.protocol(format!(
                "a gap in output: {} after {}",
                chunk.offset, self.next
            )));
        }
        self.done = chunk.eof;
        let stream = chunk.stream();
        let seen = usize::try_from(self.next - chunk.offset).unwrap_or(usize::MAX);
        if seen >= chunk.data.len() {
            return Ok(None);
        }
        let data = chunk.data.slice(seen..);
        let offset = self.next;
        self.next += data.len() as u64;
        Ok(Some(OutputChunk {
            offset,
            stream,
            data,
        }))
    }

    /// Frees everything below `offset` in the guest.
    ///
    /// # Errors
    /// Every kind of [`PortalError`].
    pub async fn ack(&mut self, offset: u64) -> Result<(), PortalError> {
        self.execution
            .ack(&self.request.container_id, &self.request.exec_id, offset)
            .await?;
        self.acked = self.acked.max(offset);
        Ok(())
    }

    /// Returns a call that acknowledges everything returned so far, if one is due, to be driven beside [`Self::next`].
    /// It counts as done immediately.
    pub(super) fn due_ack(
        &mut self,
    ) -> Option<impl Future<Output = Result<(), PortalError>> + use<>> {
        if self.next - self.acked < ACK_BYTES {
            return None;
        }
        self.acked = self.next;
        let execution = self.execution.clone();
        let (container, exec) = (
            self.request.container_id.clone(),
            self.request.exec_id.clone(),
        );
        let offset = self.next;
        Some(async move { execution.ack(&container, &exec, offset).await })
    }

    /// Acknowledges everything returned so far, if a call is due. A broken connection is handled by the next
    /// [`Self::next`].
    ///
    /// # Errors
    /// Every kind of [`PortalError`] except `Transport`.
    pub async fn ack_if_due(&mut self) -> Result<(), PortalError> {
        if self.request.observer || self.next - self.acked < ACK_BYTES {
            return Ok(());
        }
        match self.ack(self.next).await {
            Err(error) if error.is_transport() => Ok(()),
            result => result,
        }
    }

    fn protocol(&self, what: String) -> PortalError {
        PortalError::Protocol {
            call: "Execution.Attach",
            what,
        }
    }
}
