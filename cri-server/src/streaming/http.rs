//! The HTTP side: accepts connections, takes tokens, upgrades, and runs one session per connection.
//!
//! It knows URLs, headers and protocol names; what a session does is in `process` and `forward`. A request that is not a
//! valid upgrade with a valid token gets a short refusal; which of unknown, used or expired a token is, nobody learns.

use super::forward::{self, Forward};
use super::process;
use super::remote::{self, Version};
use super::websocket::{self, Subprotocol, Tunnel, channels};
use super::{Streaming, Ticket, spdy};
use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{
    CONNECTION, HeaderMap, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY,
    SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Connections at a time; more wait in the listener's queue.
const MAX_CONNECTIONS: usize = 512;
/// What a client may take for its request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest head, in bytes.
const MAX_HEADER_BYTES: usize = 16 << 10;
/// Pause after a failed accept (no descriptor left), so that it is not a busy loop.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// How often a connection is asked whether its client has left. A reader that waits for a process to take its input would
/// not see it.
const DISCONNECT_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// What is still read of a client that has left; more is of no use to anybody.
const DISCONNECT_GRACE: Duration = Duration::from_secs(3);
/// Silence after which the kernel asks whether a client is still there, in seconds.
const KEEPALIVE_IDLE_SECONDS: u32 = 60;

/// The protocol that a client asks to upgrade to.
const SPDY: &str = "SPDY/3.1";
const WEBSOCKET: &str = "websocket";
const PROTOCOL_HEADER: &str = "x-stream-protocol-version";
const ACCEPTED_HEADER: &str = "x-accepted-stream-protocol-versions";
const PORT_FORWARD: &str = "portforward.k8s.io";
/// Over SPDY; version 5 is WebSocket's.
const REMOTE_PROTOCOLS: [&str; 4] = [
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];

type Answer = Response<Full<Bytes>>;

/// Serves until `stop`, then ends all sessions and waits for them to clean up.
pub async fn serve(listener: TcpListener, streaming: Streaming, stop: CancellationToken) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((socket, permit, descriptor)) => {
                let context = Context {
                    streaming: streaming.clone(),
                    stop: stop.clone(),
                    tasks: tasks.clone(),
                    descriptor: Arc::new(descriptor),
                    permit: Arc::new(permit),
                };
                tasks.spawn(connection(socket, context));
            }
            Err(error) => {
                tracing::warn!(%error, "a streaming client was not accepted");
                tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, OwnedSemaphorePermit, OwnedFd)> {
    let permit = permits
        .clone()
        .acquire_owned()
        .await
        .map_err(std::io::Error::other)?;
    let (socket, _) = listener.accept().await?;
    socket.set_nodelay(true)?;
    setsockopt(&socket, sockopt::KeepAlive, &true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_SECONDS)?;
    let descriptor = socket.as_fd().try_clone_to_owned()?;
    Ok((socket, permit, descriptor))
}

/// What a request needs beside itself. Cheap to clone.
#[derive(Clone)]
struct Context {
    streaming: Streaming,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// The connection's socket, to ask whether the client has left.
    descriptor: Arc<OwnedFd>,
    /// Given back when connection and session have ended.
    permit: Arc<OwnedSemaphorePermit>,
}

/// One connection's requests, up to an upgrade.
async fn connection(socket: TcpStream, context: Context) {
    let stop = context.stop.clone();
    let service = service_fn(move |request| {
        let context = context.clone();
        async move { Ok::<_, Infallible>(answer(request, &context)) }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades();
    tokio::select! {
        done = serving => if let Err(error) = done {
            tracing::debug!(%error, "streaming client's request");
        },
        () = stop.cancelled() => {}
    }
}

/// Cancels `gone` when the client has left and what it sent is not read within [`DISCONNECT_GRACE`]. Never returns; the
/// session that it runs beside ends it.
async fn watch_disconnect(descriptor: Arc<OwnedFd>, gone: CancellationToken) {
    let disconnected = || {
        // The one flag that nix has no name for.
        let left = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
        let mut asked = [PollFd::new(descriptor.as_fd(), left)];
        poll(&mut asked, PollTimeout::ZERO).is_ok_and(|found| found > 0)
    };
    while !disconnected() {
        tokio::time::sleep(DISCONNECT_POLL_INTERVAL).await;
    }
    tokio::time::sleep(DISCONNECT_GRACE).await;
    gone.cancel();
    std::future::pending().await
}

/// Runs `session` with a watch over its client.
async fn run_until_disconnect(
    session: impl Future<Output = ()>,
    gone: &CancellationToken,
    context: &Context,
) {
    tokio::select! {
        () = session => {}
        () = watch_disconnect(context.descriptor.clone(), gone.clone()) => {}
    }
}

/// Refusal as plain text.
fn refuse(status: StatusCode, message: impl Into<String>) -> Answer {
    let mut message = message.into();
    message.push('\n');
    let mut answer = Response::new(Full::new(Bytes::from(message)));
    *answer.status_mut() = status;
    answer
}

/// Answers a request; a valid one becomes a session of its own task.
fn answer(request: Request<Incoming>, context: &Context) -> Answer {
    if request.method() != Method::GET && request.method() != Method::POST {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "GET or POST");
    }
    let mut parts = request.uri().path().split('/').skip(1);
    let (Some(verb), Some(token), None) = (parts.next(), parts.next(), parts.next()) else {
        return refuse(StatusCode::NOT_FOUND, "not found");
    };
    // First, as every use of a token uses it up.
    let Some(ticket) = context.streaming.tokens().redeem(token) else {
        return refuse(StatusCode::NOT_FOUND, "not found");
    };
    if ticket.verb() != verb {
        return refuse(StatusCode::NOT_FOUND, "not found");
    }
    if upgrades_to(request.headers(), SPDY) {
        return spdy_session(request, ticket, context);
    }
    if upgrades_to(request.headers(), WEBSOCKET) {
        return websocket_session(request, ticket, context);
    }
    refuse(
        StatusCode::BAD_REQUEST,
        "unable to upgrade: the request asks for no upgrade to SPDY/3.1 or websocket",
    )
}

/// Whether `Connection` and `Upgrade` ask for `protocol`.
fn upgrades_to(headers: &HeaderMap, protocol: &str) -> bool {
    values(headers, CONNECTION.as_str()).any(|value| value.eq_ignore_ascii_case(UPGRADE.as_str()))
        && values(headers, UPGRADE.as_str()).any(|value| value.eq_ignore_ascii_case(protocol))
}

/// All values of a header of lists.
fn values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

/// The first protocol the client offers that `accepted` has.
fn negotiate<'a>(headers: &HeaderMap, accepted: &[&'a str]) -> Result<&'a str, Box<Answer>> {
    let mut offered = values(headers, PROTOCOL_HEADER).peekable();
    if offered.peek().is_none() {
        return Err(Box::new(refuse(
            StatusCode::BAD_REQUEST,
            format!("unable to upgrade: header {PROTOCOL_HEADER} is missing or empty"),
        )));
    }
    for offer in offered {
        if let Some(found) = accepted.iter().find(|name| **name == offer) {
            return Ok(found);
        }
    }
    let mut answer = refuse(
        StatusCode::FORBIDDEN,
        format!("unable to upgrade: the server accepts {accepted:?}"),
    );
    for name in accepted {
        if let Ok(value) = HeaderValue::from_str(name) {
            answer.headers_mut().append(ACCEPTED_HEADER, value);
        }
    }
    Err(Box::new(answer))
}

fn spdy_session(request: Request<Incoming>, ticket: Ticket, context: &Context) -> Answer {
    let accepted: &[&str] = match &ticket {
        Ticket::Forward(_) => &[PORT_FORWARD],
        _ => &REMOTE_PROTOCOLS,
    };
    let protocol = match negotiate(request.headers(), accepted) {
        Ok(protocol) => protocol,
        Err(refusal) => return *refusal,
    };
    let version = Version::named(protocol).unwrap_or(Version::V4);
    let session = context.clone();
    upgrade(request, context, move |io| async move {
        run_spdy(io, ticket, version, &session).await;
    });
    let mut answer = switching(SPDY);
    if let Ok(value) = HeaderValue::from_str(protocol) {
        answer.headers_mut().insert(PROTOCOL_HEADER, value);
    }
    answer
}

/// A stream of bytes after an upgrade.
type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// Runs `session` as a task of its own once the answer is sent.
fn upgrade<F>(
    request: Request<Incoming>,
    context: &Context,
    session: impl FnOnce(Upgraded) -> F + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    let permit = context.permit.clone();
    context.tasks.spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(upgraded) => session(TokioIo::new(upgraded)).await,
            Err(error) => tracing::debug!(%error, "streaming client did not upgrade"),
        }
        drop(permit);
    });
}

fn switching(protocol: &'static str) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static(protocol));
    answer
}

fn websocket_session(request: Request<Incoming>, ticket: Ticket, context: &Context) -> Answer {
    let headers = request.headers();
    let of: fn(&str) -> Option<Subprotocol> = match &ticket {
        Ticket::Forward(_) => Subprotocol::of_forward,
        _ => Subprotocol::of_command,
    };
    let found = {
        let mut offered = values(headers, SEC_WEBSOCKET_PROTOCOL.as_str()).peekable();
        match offered.peek() {
            None => of("").map(|subprotocol| (String::new(), subprotocol)),
            Some(_) => offered.find_map(|name| Some((name.to_owned(), of(name)?))),
        }
    };
    let Some((name, subprotocol)) = found else {
        return refuse(
            StatusCode::FORBIDDEN,
            "unable to upgrade: none of the offered subprotocols is known",
        );
    };
    let key = match headers.get(SEC_WEBSOCKET_KEY) {
        Some(key) if request.method() == Method::GET => derive_accept_key(key.as_bytes()),
        _ => return refuse(StatusCode::BAD_REQUEST, "not a WebSocket handshake"),
    };
    if headers
        .get(SEC_WEBSOCKET_VERSION)
        .is_none_or(|version| version != "13")
    {
        let mut answer = refuse(StatusCode::UPGRADE_REQUIRED, "WebSocket version 13");
        let version = HeaderValue::from_static("13");
        answer.headers_mut().insert(SEC_WEBSOCKET_VERSION, version);
        return answer;
    }
    let session = context.clone();
    upgrade(request, context, move |io| async move {
        run_websocket(io, ticket, subprotocol, &session).await;
    });
    let mut answer = switching(WEBSOCKET);
    for (header, value) in [(SEC_WEBSOCKET_ACCEPT, key), (SEC_WEBSOCKET_PROTOCOL, name)] {
        if let Ok(value) = HeaderValue::from_str(&value)
            && !value.is_empty()
        {
            answer.headers_mut().insert(header, value);
        }
    }
    answer
}

/// A session over WebSocket.
async fn run_websocket(io: Upgraded, ticket: Ticket, kind: Subprotocol, context: &Context) {
    let socket = websocket::accept(io).await;
    let Subprotocol::Channels { version, base64 } = kind else {
        return run_spdy(Tunnel::new(socket), ticket, Version::V4, context).await;
    };
    let idle = context.streaming.limits().idle_timeout;
    let gone = context.stop.child_token();
    let kind = (version, base64);
    let serving = channels::serve(socket, kind, idle, gone.clone(), move |channels| {
        let session: BoxFuture<'static, ()> = match ticket {
            Ticket::Exec(exec) => {
                let remote = channels.remote(exec.streams, version);
                Box::pin(process::exec(exec, remote))
            }
            Ticket::Attach(attach) => {
                let remote = channels.remote(attach.streams, version);
                Box::pin(process::attach(attach, remote))
            }
            Ticket::Forward(Forward { pod, ports }) => {
                // Two channels a port, numbered in one byte; a call with more ports is refused.
                let pairs = ports.into_iter().zip((0..=u8::MAX - 1).step_by(2));
                let pairs = pairs.map(|(port, data)| {
                    let input = channels.input(data);
                    (
                        port,
                        input,
                        channels.output(data),
                        channels.output(data + 1),
                    )
                });
                Box::pin(forward::serve_channels(pod, pairs.collect()))
            }
        };
        session
    });
    run_until_disconnect(serving, &gone, context).await;
}

/// A session over SPDY on any byte stream.
async fn run_spdy<IO>(io: IO, ticket: Ticket, version: Version, context: &Context)
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let limits = context.streaming.limits();
    let gone = context.stop.child_token();
    let for_handler = gone.clone();
    let creation = limits.creation_timeout;
    let serving = spdy::serve(
        io,
        limits.idle_timeout,
        gone.clone(),
        move |accept| async move {
            match ticket {
                Ticket::Forward(Forward { pod, .. }) => {
                    forward::serve(pod, accept, for_handler, creation).await;
                }
                Ticket::Exec(exec) => {
                    if let Some(remote) =
                        collect(accept, exec.streams, version, for_handler, creation).await
                    {
                        process::exec(exec, remote).await;
                    }
                }
                Ticket::Attach(attach) => {
                    if let Some(remote) =
                        collect(accept, attach.streams, version, for_handler, creation).await
                    {
                        process::attach(attach, remote).await;
                    }
                }
            }
        },
    );
    run_until_disconnect(serving, &gone, context).await;
}

async fn collect(
    mut accept: spdy::Accept,
    wanted: remote::RequestedStreams,
    version: Version,
    gone: CancellationToken,
    limit: Duration,
) -> Option<remote::Remote> {
    match remote::collect(&mut accept, wanted, version, gone, limit).await {
        Ok(remote) => Some(remote),
        Err(error) => {
            tracing::info!(%error, "streaming session did not start");
            None
        }
    }
}
