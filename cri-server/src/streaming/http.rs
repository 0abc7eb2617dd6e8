//! The HTTP side: accepts connections, redeems tokens, upgrades, and runs one session per connection.
//!
//! Sessions are in `process` and `forward`. A request that is not a valid upgrade with a valid token is rejected
//! without revealing whether a token is unknown, used or expired.

use super::forward::{self, Forward};
use super::output::Output;
use super::process;
use super::protocol::{RequestedStreams, Version};
use super::remote::{self, Remote};
use super::sessions::Session;
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

/// Maximum number of connections; others wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 512;
/// Timeout of the request header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum size of the request header.
const MAX_HEADER_BYTES: usize = 16 << 10;
/// Delay after a failed accept (no free descriptor), which avoids a busy loop.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Interval of the check whether the client has disconnected. A reader blocked by a process that does not read its
/// input would not notice.
const DISCONNECT_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Time to read the remaining data of a disconnected client.
const DISCONNECT_GRACE: Duration = Duration::from_secs(3);
/// Idle time in seconds after which the kernel probes the client.
const KEEPALIVE_IDLE_SECONDS: u32 = 60;

/// Protocols of the Upgrade header.
const SPDY: &str = "SPDY/3.1";
const WEBSOCKET: &str = "websocket";
const PROTOCOL_HEADER: &str = "x-stream-protocol-version";
const ACCEPTED_HEADER: &str = "x-accepted-stream-protocol-versions";
const PORT_FORWARD: &str = "portforward.k8s.io";
/// Subprotocols over SPDY; version 5 exists only for WebSocket.
const REMOTE_PROTOCOLS: [&str; 4] = [
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];

type Answer = Response<Full<Bytes>>;

/// Serves until `stop` is cancelled, then ends all sessions and waits for their cleanup.
pub(crate) async fn serve(listener: TcpListener, streaming: Streaming, stop: CancellationToken) {
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
                tracing::warn!(%error, "failed to accept streaming client");
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

/// Context of a request. Cheap to clone.
#[derive(Clone)]
struct Context {
    streaming: Streaming,
    stop: CancellationToken,
    tasks: TaskTracker,
    /// Socket of the connection, used to detect a disconnect.
    descriptor: Arc<OwnedFd>,
    /// Released when connection and session have ended.
    permit: Arc<OwnedSemaphorePermit>,
}

/// Handles the requests of one connection up to an upgrade.
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
            tracing::debug!(%error, "streaming request failed");
        },
        () = stop.cancelled() => {}
    }
}

/// Cancels `gone` if the client has disconnected and its data is not read within [`DISCONNECT_GRACE`]. Never returns;
/// it ends with its session.
async fn watch_disconnect(descriptor: Arc<OwnedFd>, gone: CancellationToken) {
    let disconnected = || {
        // nix has no name for this flag.
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

/// Runs `session` and watches for a disconnect.
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

/// Returns an error response in plain text.
fn refuse(status: StatusCode, message: impl Into<String>) -> Answer {
    let mut message = message.into();
    message.push('\n');
    let mut answer = Response::new(Full::new(Bytes::from(message)));
    *answer.status_mut() = status;
    answer
}

/// Answers a request; a valid one starts a session in a separate task.
fn answer(request: Request<Incoming>, context: &Context) -> Answer {
    if request.method() != Method::GET && request.method() != Method::POST {
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "GET or POST");
    }
    let mut parts = request.uri().path().split('/').skip(1);
    let (Some(endpoint), Some(token), None) = (parts.next(), parts.next(), parts.next()) else {
        return refuse(StatusCode::NOT_FOUND, "not found");
    };
    // First, because every use of a token invalidates it.
    let Some(ticket) = context.streaming.tokens().redeem(token) else {
        return refuse(StatusCode::NOT_FOUND, "not found");
    };
    if ticket.endpoint() != endpoint {
        return refuse(StatusCode::NOT_FOUND, "not found");
    }
    let session = match context.streaming.sessions().begin(ticket.pod()) {
        Ok(session) => session,
        Err(error) => return refuse(StatusCode::SERVICE_UNAVAILABLE, error.to_string()),
    };
    if upgrades_to(request.headers(), SPDY) {
        return spdy_session(request, ticket, session, context);
    }
    if upgrades_to(request.headers(), WEBSOCKET) {
        return websocket_session(request, ticket, session, context);
    }
    refuse(
        StatusCode::BAD_REQUEST,
        "unable to upgrade: the request is not an upgrade to SPDY/3.1 or websocket",
    )
}

/// Returns whether `Connection` and `Upgrade` request `protocol`.
fn upgrades_to(headers: &HeaderMap, protocol: &str) -> bool {
    values(headers, CONNECTION.as_str()).any(|value| value.eq_ignore_ascii_case(UPGRADE.as_str()))
        && values(headers, UPGRADE.as_str()).any(|value| value.eq_ignore_ascii_case(protocol))
}

/// Returns all values of a list header.
fn values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|value| !value.is_empty())
}

/// Returns the first offered protocol that is in `accepted`.
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

fn spdy_session(
    request: Request<Incoming>,
    ticket: Ticket,
    counted: Session,
    context: &Context,
) -> Answer {
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
        drop(counted);
    });
    let mut answer = switching(SPDY);
    if let Ok(value) = HeaderValue::from_str(protocol) {
        answer.headers_mut().insert(PROTOCOL_HEADER, value);
    }
    answer
}

/// Byte stream after an upgrade.
type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// Runs `session` in a separate task after the response is sent.
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
            Err(error) => tracing::debug!(%error, "failed to upgrade streaming client"),
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

fn websocket_session(
    request: Request<Incoming>,
    ticket: Ticket,
    counted: Session,
    context: &Context,
) -> Answer {
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
            "unable to upgrade: no supported subprotocol offered",
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
        drop(counted);
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

/// Runs a session over WebSocket.
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
                let remote = Remote::of_channels(channels, exec.streams, version);
                Box::pin(process::exec(exec, remote))
            }
            Ticket::Attach(attach) => {
                let remote = Remote::of_channels(channels, attach.streams, version);
                Box::pin(process::attach(attach, remote))
            }
            Ticket::Forward(Forward { pod, ports }) => {
                // Two channels per port, numbered in one byte; PortForward rejects more ports.
                let pairs = ports.into_iter().zip((0..=u8::MAX - 1).step_by(2));
                let pairs = pairs.map(|(port, data)| {
                    let input = channels.input(data);
                    (
                        port,
                        input,
                        Output::Channel(channels.output(data)),
                        Output::Channel(channels.output(data + 1)),
                    )
                });
                Box::pin(forward::serve_channels(pod, pairs.collect()))
            }
        };
        session
    });
    run_until_disconnect(serving, &gone, context).await;
}

/// Runs a session over SPDY on any byte stream.
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
    wanted: RequestedStreams,
    version: Version,
    gone: CancellationToken,
    limit: Duration,
) -> Option<Remote> {
    match remote::collect(&mut accept, wanted, version, gone, limit).await {
        Ok(remote) => Some(remote),
        Err(error) => {
            tracing::info!(%error, "failed to start streaming session");
            None
        }
    }
}
