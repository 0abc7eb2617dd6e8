//! Port-forward: streams of a client to ports inside the VM.
//!
//! Over SPDY each forwarded connection is a pair of streams with the same request id: data, and error ([`serve`]).
//! [`forward`] handles one connection on any transport. Half-close is preserved in both directions, and nothing is
//! buffered here. All ports may be dialed: the pod belongs to the client.

use super::input::Input;
use super::output::Output;
use super::process::chunks;
use super::remote::STREAM_TYPE;
use super::spdy::{Accept, Stream};
use boxlite_portal::PortalError;
use boxlite_runtime::{LiteBox, RuntimeError, report};
use bytes::Bytes;
use std::collections::HashMap;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Maximum number of incomplete pairs; a client opens the streams one after the other.
const MAX_HALF_OPEN_PAIRS: usize = 64;

/// Request of PortForward.
#[derive(Debug, Clone)]
pub(crate) struct Forward {
    pub pod: LiteBox,
    /// Ports for WebSocket's first protocol, whose clients do not name ports.
    pub ports: Vec<u16>,
}

/// Serves pairs of streams until the client disconnects. Its connections end with it, and when the future is dropped.
pub(crate) async fn serve(
    pod: LiteBox,
    mut accept: Accept,
    gone: CancellationToken,
    limit: Duration,
) {
    let mut halves = Halves::default();
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = gone.cancelled() => break,
            stream = accept.recv() => {
                let Some(stream) = stream else { break };
                if let Some((port, data, error)) = halves.add(stream).await {
                    let (data_out, error_out) = (Output::Spdy(data.output), Output::Spdy(error.output));
                    running.spawn(forward(pod.clone(), port, data.input, data_out, error_out));
                }
            }
            Some(_) = running.join_next() => {}
            () = halves.next_expiry(limit) => halves.expire(limit).await,
        }
    }
    // Connections detect the closed stream; a dial in progress is cancelled.
    running.shutdown().await;
}

/// Serves a fixed list of connections on pairs of channels: data, then error. Each channel starts with its port in
/// two bytes, little-endian, as WebSocket's first protocol requires.
pub(crate) async fn serve_channels(pod: LiteBox, pairs: Vec<(u16, Input, Output, Output)>) {
    let mut running = JoinSet::new();
    for (port, input, mut data, mut error) in pairs {
        let pod = pod.clone();
        running.spawn(async move {
            let head = Bytes::copy_from_slice(&port.to_le_bytes());
            if data.write(head.clone()).await.is_ok() && error.write(head).await.is_ok() {
                forward(pod, port, input, data, error).await;
            }
        });
    }
    while running.join_next().await.is_some() {}
}

/// An incomplete pair.
#[derive(Debug)]
struct Half {
    port: u16,
    stream: Stream,
    is_data: bool,
    since: Instant,
}

#[derive(Debug, Default)]
struct Halves {
    waiting: HashMap<String, Half>,
}

impl Halves {
    /// Returns the pair that `stream` completes: port, data, error. Unexpected streams are reset.
    async fn add(&mut self, stream: Stream) -> Option<(u16, Stream, Stream)> {
        let Some((port, is_data)) = described(&stream) else {
            stream.output.reset().await;
            return None;
        };
        let id = request_id(&stream, is_data);
        match self.waiting.remove(&id) {
            Some(half) if half.is_data != is_data && half.port == port => Some(if is_data {
                (port, stream, half.stream)
            } else {
                (port, half.stream, stream)
            }),
            Some(half) => {
                half.stream.output.reset().await;
                stream.output.reset().await;
                None
            }
            None if self.waiting.len() >= MAX_HALF_OPEN_PAIRS => {
                stream.output.reset().await;
                None
            }
            None => {
                let half = Half {
                    port,
                    stream,
                    is_data,
                    since: Instant::now(),
                };
                self.waiting.insert(id, half);
                None
            }
        }
    }

    /// Waits until the oldest half has waited for `limit`; forever without halves.
    async fn next_expiry(&self, limit: Duration) {
        match self.waiting.values().map(|half| half.since).min() {
            Some(since) => tokio::time::sleep_until(since + limit).await,
            None => std::future::pending().await,
        }
    }

    async fn expire(&mut self, limit: Duration) {
        let late: Vec<String> = self
            .waiting
            .iter()
            .filter(|(_, half)| half.since.elapsed() >= limit)
            .map(|(id, _)| id.clone())
            .collect();
        for id in late {
            if let Some(half) = self.waiting.remove(&id) {
                tracing::debug!(
                    port = half.port,
                    "second stream of forwarded connection did not arrive"
                );
                half.stream.output.reset().await;
            }
        }
    }
}

/// Returns port and purpose of a stream from its headers.
fn described(stream: &Stream) -> Option<(u16, bool)> {
    let port = stream.headers.get("port").parse().ok()?;
    let is_data = match stream.headers.get(STREAM_TYPE) {
        "data" => true,
        "error" => false,
        _ => return None,
    };
    (port != 0).then_some((port, is_data))
}

/// Returns the request id. Old clients send none; the ids of their pairs are adjacent, error first.
fn request_id(stream: &Stream, is_data: bool) -> String {
    match stream.headers.get("requestid") {
        "" if is_data => format!("#{}", i64::from(stream.id) - 2),
        "" => format!("#{}", stream.id),
        id => id.to_owned(),
    }
}

/// Carries one connection to its end. Dropping the future ends it in the guest, too.
pub(crate) async fn forward(
    pod: LiteBox,
    port: u16,
    input: Input,
    data: Output,
    mut error: Output,
) {
    let gone = input.gone().clone();
    let carried = tokio::select! {
        biased;
        () = gone.cancelled() => return,
        carried = carry(&pod, port, input, data) => carried,
    };
    if let Err(reason) = carried {
        let message = format!(
            "error forwarding port {port} to pod {}: {}",
            pod.id(),
            guest_message(&reason)
        );
        tracing::debug!(message, "port-forward connection failed");
        let _ = error.write(message.into()).await;
    }
    error.finish().await;
}

async fn carry(pod: &LiteBox, port: u16, input: Input, data: Output) -> Result<(), RuntimeError> {
    let mut answers = match pod.port_forward(port, chunks(input)).await {
        Ok(answers) => answers,
        Err(error) => {
            data.reset().await;
            return Err(error);
        }
    };
    let mut open = Some(data);
    loop {
        let answer = match answers.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => break,
            Err(status) => {
                if let Some(data) = open {
                    data.reset().await;
                }
                let error = PortalError::from_status("Guest.PortForward", status);
                return Err(match error.is_transport() {
                    true => pod.guest_error(format!("forward port {port}"), error).await,
                    false => error.into(),
                });
            }
        };
        let Some(data) = &mut open else { continue };
        if !answer.data.is_empty() && data.write(answer.data).await.is_err() {
            return Ok(());
        }
        if answer.eof
            && let Some(data) = open.take()
        {
            // Half-close by the server; the client may continue to send.
            data.finish().await;
        }
    }
    if let Some(data) = open {
        data.finish().await;
    }
    Ok(())
}

/// Returns the guest's message in the form of other runtimes: "connection refused".
fn guest_message(error: &RuntimeError) -> String {
    match error {
        RuntimeError::Portal(PortalError::Guest { message, .. }) => message.to_lowercase(),
        error => report(error),
    }
}
