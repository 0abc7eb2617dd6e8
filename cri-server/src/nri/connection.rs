//! Connection of one plugin: calls in both directions over one socket.
//!
//! ```text
//!  call() ── writer ──▶ trunk ◀──▶ plugin
//!    ▲                    │
//!    └── pending ◀── reader task ──▶ server task ──▶ Service
//! ```
//!
//! Every call has a deadline; a call that misses it closes the connection, because its answer may still arrive. The
//! meaning of the messages is defined in [`super::plugin`].

use super::wire::{
    self, Assembler, MAX_MESSAGE_BYTES, Message, PLUGIN_SERVICE, REQUEST, RESPONSE,
    RUNTIME_SERVICE, Request, Response, RpcStatus, WireError,
};
use boxlite_sys::sync::Mutex;
use prost::Message as _;
use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Name of the plugin's ttrpc service.
const PLUGIN: &str = "nri.pkg.api.v1alpha1.Plugin";
/// Codes of google.rpc that NRI uses.
pub(crate) const INVALID_ARGUMENT: i32 = 3;
pub(crate) const UNIMPLEMENTED: i32 = 12;
/// Maximum number of queued calls of a plugin. A plugin sends one and waits; more is a protocol violation.
const MAX_QUEUED_REQUESTS: usize = 16;
/// Timeout of writing an answer: a plugin that does not read is dead.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Failure of a call to a plugin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The plugin returned an error.
    #[error("{message}")]
    Rejected { code: i32, message: String },
    /// The plugin did not answer in time.
    #[error("{method} not answered within {limit:?}")]
    Timeout {
        method: &'static str,
        limit: Duration,
    },
    /// The connection is closed.
    #[error("connection of the plugin is closed")]
    Closed,
    /// The connection broke.
    #[error("failed to use the connection of the plugin")]
    Wire(#[from] WireError),
    /// The request exceeds the message size that a plugin accepts.
    #[error("{method} request too large: {bytes} bytes (maximum {MAX_MESSAGE_BYTES})")]
    TooLarge { method: &'static str, bytes: usize },
    /// The answer cannot be decoded.
    #[error("failed to decode the answer to {method}")]
    Garbled {
        method: &'static str,
        #[source]
        source: prost::DecodeError,
    },
}

/// Service of the runtime for a plugin.
#[tonic::async_trait]
pub(crate) trait Service: Send + Sync + 'static {
    /// Handles one call.
    async fn call(&self, service: &str, method: &str, payload: &[u8])
    -> Result<Vec<u8>, RpcStatus>;
}

/// A connection. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Connection(Arc<Inner>);

struct Inner {
    writer: tokio::sync::Mutex<Writer>,
    pending: Mutex<HashMap<u32, oneshot::Sender<Response>>>,
    closed: CancellationToken,
    is_kept_on_timeout: AtomicBool,
    /// Used to shut the socket down while other tasks read or write.
    socket: StdUnixStream,
}

struct Writer {
    half: OwnedWriteHalf,
    /// ttrpc stream ids of a client are odd and increase.
    next_stream: u32,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

/// Closes a connection on drop unless disarmed: after a dropped future the stream may end within a message.
struct CloseOnDrop<'a>(Option<&'a Connection>);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(connection) = self.0 {
            connection.close();
        }
    }
}

impl Connection {
    /// Takes over a socket. Two tasks of `tasks` read it and serve the plugin's calls until it is closed.
    pub(crate) fn open(
        socket: StdUnixStream,
        service: Arc<dyn Service>,
        tasks: &TaskTracker,
    ) -> std::io::Result<Self> {
        socket.set_nonblocking(true)?;
        let kept = socket.try_clone()?;
        let (reader, writer) = UnixStream::from_std(socket)?.into_split();
        let this = Self(Arc::new(Inner {
            writer: tokio::sync::Mutex::new(Writer {
                half: writer,
                next_stream: 1,
            }),
            pending: Mutex::default(),
            closed: CancellationToken::new(),
            is_kept_on_timeout: AtomicBool::new(false),
            socket: kept,
        }));
        let (requests, queue) = mpsc::channel(MAX_QUEUED_REQUESTS);
        tasks.spawn(this.clone().read(reader, requests));
        tasks.spawn(this.clone().serve(queue, service));
        Ok(this)
    }

    /// Calls the plugin and waits for its answer for at most `limit`; a timeout closes the connection unless [`Self::keep_on_timeout`].
    ///
    /// Dropping the future abandons the answer; during the write of the request it closes the connection.
    pub(crate) async fn call<A: prost::Message + Default>(
        &self,
        method: &'static str,
        request: &impl prost::Message,
        limit: Duration,
    ) -> Result<A, CallError> {
        let payload = Request {
            service: PLUGIN.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
        }
        .encode_to_vec();
        if payload.len() > MAX_MESSAGE_BYTES {
            return Err(CallError::TooLarge {
                method,
                bytes: payload.len(),
            });
        }
        let answer = match tokio::time::timeout(limit, self.exchange(payload)).await {
            Ok(answer) => answer?,
            Err(_) => {
                if !self.0.is_kept_on_timeout.load(Ordering::Relaxed) {
                    self.close();
                }
                return Err(CallError::Timeout { method, limit });
            }
        };
        match answer.status {
            Some(status) if status.code != 0 => Err(CallError::Rejected {
                code: status.code,
                message: status.message,
            }),
            _ => A::decode(&answer.payload[..])
                .map_err(|source| CallError::Garbled { method, source }),
        }
    }

    async fn exchange(&self, payload: Vec<u8>) -> Result<Response, CallError> {
        let (sender, answer) = oneshot::channel();
        let stream = {
            let mut writer = self.0.writer.lock().await;
            let stream = writer.next_stream;
            writer.next_stream = stream.wrapping_add(2);
            self.pending().insert(stream, sender);
            // After the insertion: `close` clears the map, and a caller that finds the connection closed here does
            // not wait.
            if self.is_closed() {
                self.pending().remove(&stream);
                return Err(CallError::Closed);
            }
            let mut close_on_drop = CloseOnDrop(Some(self));
            let message = Message {
                stream,
                kind: REQUEST,
                payload,
            };
            wire::write(&mut writer.half, PLUGIN_SERVICE, &message).await?;
            close_on_drop.0 = None;
            stream
        };
        let _forget = RemovePending {
            connection: self,
            stream,
        };
        answer.await.map_err(|_| CallError::Closed)
    }

    /// Shuts the socket down and fails every pending call. Idempotent.
    pub(crate) fn close(&self) {
        self.0.closed.cancel();
        // Fails if the socket is already disconnected.
        let _ = self.0.socket.shutdown(Shutdown::Both);
        self.pending().clear();
    }

    /// Keeps the connection open after a timeout; a late answer is dropped.
    pub(crate) fn keep_on_timeout(&self) {
        self.0.is_kept_on_timeout.store(true, Ordering::Relaxed);
    }

    /// Returns whether either side closed the connection.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.closed.is_cancelled()
    }

    /// Waits until it is closed.
    pub(crate) async fn closed(&self) {
        self.0.closed.cancelled().await;
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<u32, oneshot::Sender<Response>>> {
        self.0.pending.lock()
    }

    async fn read(self, mut reader: OwnedReadHalf, requests: mpsc::Sender<Message>) {
        let _close_on_drop = CloseOnDrop(Some(&self));
        let (mut answers, mut calls) = (Assembler::default(), Assembler::default());
        loop {
            let frame = match self
                .0
                .closed
                .run_until_cancelled(wire::read(&mut reader))
                .await
            {
                Some(Ok(Some(frame))) => frame,
                Some(Ok(None)) | None => return,
                Some(Err(error)) => {
                    tracing::debug!(
                        error = boxlite_runtime::report(&error),
                        "connection of NRI plugin ended"
                    );
                    return;
                }
            };
            let (connection, bytes) = frame;
            let done = match connection {
                PLUGIN_SERVICE => self.take_answers(&mut answers, &bytes),
                RUNTIME_SERVICE => take_calls(&mut calls, &bytes, &requests),
                // Like the published multiplexer, drop frames of a connection that was not opened.
                _ => Ok(true),
            };
            match done {
                Ok(true) => {}
                Ok(false) => {
                    tracing::warn!("closing connection of NRI plugin: too many concurrent calls");
                    return;
                }
                Err(error) => {
                    tracing::warn!(
                        error = boxlite_runtime::report(&error),
                        "closing connection of NRI plugin"
                    );
                    return;
                }
            }
        }
    }

    fn take_answers(&self, answers: &mut Assembler, bytes: &[u8]) -> Result<bool, WireError> {
        answers.push(bytes);
        while let Some(message) = answers.next()? {
            let pending = self.pending().remove(&message.stream);
            // An answer without a pending call is late.
            if let (Some(pending), RESPONSE) = (pending, message.kind) {
                let response =
                    Response::decode(&message.payload[..]).unwrap_or_else(|error| Response {
                        status: Some(RpcStatus {
                            code: INVALID_ARGUMENT,
                            message: format!("failed to decode answer: {error}"),
                        }),
                        payload: Vec::new(),
                    });
                let _ = pending.send(response);
            }
        }
        Ok(true)
    }

    async fn serve(self, mut queue: mpsc::Receiver<Message>, service: Arc<dyn Service>) {
        let _close_on_drop = CloseOnDrop(Some(&self));
        while let Some(message) = queue.recv().await {
            let answer = match Request::decode(&message.payload[..]) {
                Ok(request) => {
                    let work = service.call(&request.service, &request.method, &request.payload);
                    match self.0.closed.run_until_cancelled(work).await {
                        Some(answer) => answer,
                        None => return,
                    }
                }
                Err(error) => Err(RpcStatus {
                    code: INVALID_ARGUMENT,
                    message: error.to_string(),
                }),
            };
            let response = match answer {
                Ok(payload) => Response {
                    status: None,
                    payload,
                },
                Err(status) => Response {
                    status: Some(status),
                    payload: Vec::new(),
                },
            };
            let message = Message {
                stream: message.stream,
                kind: RESPONSE,
                payload: response.encode_to_vec(),
            };
            let write = async {
                let mut writer = self.0.writer.lock().await;
                wire::write(&mut writer.half, RUNTIME_SERVICE, &message).await
            };
            match tokio::time::timeout(ANSWER_TIMEOUT, write).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return,
            }
        }
    }
}

/// Queues the calls of a plugin; returns false if it exceeds the number of unanswered calls.
fn take_calls(
    calls: &mut Assembler,
    bytes: &[u8],
    requests: &mpsc::Sender<Message>,
) -> Result<bool, WireError> {
    calls.push(bytes);
    while let Some(message) = calls.next()? {
        if message.kind == REQUEST && requests.try_send(message).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Removes a pending call when its caller drops it.
struct RemovePending<'a> {
    connection: &'a Connection,
    stream: u32,
}

impl Drop for RemovePending<'_> {
    fn drop(&mut self) {
        self.connection.pending().remove(&self.stream);
    }
}
