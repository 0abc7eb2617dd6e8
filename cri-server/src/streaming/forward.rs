//! Port-forward: streams of a client to ports inside the VM, many at a time.
//!
//! Over SPDY each forwarded connection is a pair of streams with one request id: data, and error for what went wrong
//! ([`serve`]). One connection is [`forward`], whatever the transport. Half-close is kept both ways, and nothing is
//! buffered here. Which port may be dialled is not restricted: the pod is the client's.

use super::pipe::{Input, Output};
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

/// Half pairs that wait for their other half; a client opens one after the other.
const MAX_HALF_OPEN_PAIRS: usize = 64;

/// What a PortForward call asked for.
#[derive(Debug, Clone)]
pub struct Forward {
    pub pod: LiteBox,
    /// For WebSocket's first protocol, whose clients name ports nowhere else.
    pub ports: Vec<u16>,
}

/// Serves pairs of streams until the client is gone. Its connections end with it; dropped, they end too.
pub async fn serve(pod: LiteBox, mut accept: Accept, gone: CancellationToken, limit: Duration) {
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
    // Each sees by itself that its stream is gone; a dial under way need not be waited for.
    running.shutdown().await;
}

/// Serves a fixed list of connections, one of each port, on pairs of channels: data, then error. Each begins with its
/// port in two bytes, little-endian, as WebSocket's first protocol wants it.
pub async fn serve_channels(pod: LiteBox, pairs: Vec<(u16, Input, Output, Output)>) {
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

/// A pair that is not whole yet.
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
    /// The whole pair that `stream` completes: port, data, error. What cannot belong to one is reset.
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

    /// Returns when the oldest half has waited for `limit`; never without one.
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
                    "a forwarded connection's second stream did not come"
                );
                half.stream.output.reset().await;
            }
        }
    }
}

/// Port and use of a stream, by its headers.
fn described(stream: &Stream) -> Option<(u16, bool)> {
    let port = stream.headers.get("port").parse().ok()?;
    let is_data = match stream.headers.get(STREAM_TYPE) {
        "data" => true,
        "error" => false,
        _ => return None,
    };
    (port != 0).then_some((port, is_data))
}

/// The request id. Old clients send none; their pairs have neighbouring stream ids, error first.
fn request_id(stream: &Stream, is_data: bool) -> String {
    match stream.headers.get("requestid") {
        "" if is_data => format!("#{}", i64::from(stream.id) - 2),
        "" => format!("#{}", stream.id),
        id => id.to_owned(),
    }
}

/// Carries one connection to its end. Dropped, it ends in the guest too.
pub async fn forward(pod: LiteBox, port: u16, input: Input, data: Output, mut error: Output) {
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
        tracing::debug!(message, "port-forward");
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
                return Err(PortalError::from_status("Guest.PortForward", status).into());
            }
        };
        let Some(data) = &mut open else { continue };
        if !answer.data.is_empty() && data.write(answer.data).await.is_err() {
            return Ok(());
        }
        if answer.eof
            && let Some(data) = open.take()
        {
            // The server's half-close; the client may still be sending.
            data.finish().await;
        }
    }
    if let Some(data) = open {
        data.finish().await;
    }
    Ok(())
}

/// The guest's own words where it refused, in the form that clients of other runtimes know: "connection refused".
fn guest_message(error: &RuntimeError) -> String {
    match error {
        RuntimeError::Portal(PortalError::Guest { message, .. }) => message.to_lowercase(),
        error => report(error),
    }
}
