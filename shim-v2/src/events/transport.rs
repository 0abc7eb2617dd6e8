//! [`EventTransport`]: delivers events to the receiver's ttrpc Events service, or, if it names none, by running its binary as
//! `<program> --address <socket> publish`. The caller retries.

use super::FORWARD_TIMEOUT;
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::ttrpc;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::process::Command;

/// Timeout of a run of containerd's binary, which loads some 40 MB per event: seconds on a loaded machine.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(30);

/// Transport of events to the receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventTransport {
    /// No receiver; events are dropped.
    Disabled,
    /// ttrpc socket, with the prefix `unix://`.
    Socket(String),
    /// containerd's binary (flag `-publish-binary`) and its socket.
    Program { path: PathBuf, address: String },
}

impl EventTransport {
    /// Selects the transport: `TTRPC_ADDRESS` takes precedence, as containerd's documentation of runtime v2 requires.
    pub fn new(ttrpc: &str, program: &str, address: &str) -> Self {
        let path = plain(ttrpc);
        match (path.is_empty(), program.is_empty()) {
            (false, _) => Self::Socket(format!("unix://{path}")),
            (true, false) => Self::Program {
                path: program.into(),
                address: address.to_owned(),
            },
            (true, true) => Self::Disabled,
        }
    }
}

/// Strips the prefix of a socket address.
fn plain(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

/// Reasons why an event was not delivered.
pub(super) enum Failure {
    /// The receiver is unreachable.
    Unreachable,
    /// The receiver returned an error.
    Rejected(ttrpc::Error),
}

/// A transport with its open connection.
pub(super) struct Sender {
    transport: EventTransport,
    client: Option<EventsClient>,
}

impl Sender {
    pub(super) fn new(transport: EventTransport) -> Self {
        Self {
            transport,
            client: None,
        }
    }

    /// Delivers one event within [`FORWARD_TIMEOUT`] or [`PROGRAM_TIMEOUT`]. If dropped, the event may have been delivered.
    pub(super) async fn send(&mut self, envelope: Envelope) -> Result<(), Failure> {
        let timeout = match self.transport {
            EventTransport::Disabled | EventTransport::Socket(_) => FORWARD_TIMEOUT,
            EventTransport::Program { .. } => PROGRAM_TIMEOUT,
        };
        let sent = async {
            match self.transport.clone() {
                EventTransport::Disabled => Ok(()),
                EventTransport::Socket(address) => self.forward(&address, envelope).await,
                EventTransport::Program { path, address } => {
                    publish(&path, &address, envelope).await
                }
            }
        };
        let result = tokio::time::timeout(timeout, sent).await;
        let result = result.unwrap_or(Err(Failure::Unreachable));
        if result.is_err() {
            self.client = None;
        }
        result
    }

    async fn forward(&mut self, address: &str, envelope: Envelope) -> Result<(), Failure> {
        let connected = match &self.client {
            Some(connected) => connected.clone(),
            None => {
                let fresh = EventsClient::new(
                    Client::connect(address)
                        .await
                        .map_err(|_| Failure::Unreachable)?,
                );
                self.client.insert(fresh).clone()
            }
        };
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        let context = ttrpc::context::with_duration(FORWARD_TIMEOUT);
        match connected.forward(context, &request).await {
            Ok(_) => Ok(()),
            Err(error @ ttrpc::Error::RpcStatus(_)) => Err(Failure::Rejected(error)),
            Err(_) => Err(Failure::Unreachable),
        }
    }
}

/// Runs containerd's binary once, with the event's Any on its standard input.
async fn publish(path: &std::path::Path, address: &str, envelope: Envelope) -> Result<(), Failure> {
    let event = envelope.event.write_to_bytes().unwrap_or_default();
    let mut child = Command::new(path)
        .args(["--address", address, "publish"])
        .args(["--topic", &envelope.topic])
        .args(["--namespace", &envelope.namespace])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|_| Failure::Unreachable)?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it exited early, its exit status says so.
        drop(stdin.write_all(&event).await);
    }
    match child.wait().await {
        Ok(status) if status.success() => Ok(()),
        // The exit status does not reveal whether containerd is down. If it is, the event is kept, as with a socket.
        Ok(_) if UnixStream::connect(plain(address)).await.is_err() => Err(Failure::Unreachable),
        Ok(status) => Err(Failure::Rejected(ttrpc::Error::Others(format!(
            "{} publish: {status}",
            path.display()
        )))),
        Err(_) => Err(Failure::Unreachable),
    }
}
