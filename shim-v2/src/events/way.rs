//! [`Way`]: how events reach the daemon: its ttrpc Events service, or, where it names none, its own program as
//! `<program> --address <socket> publish`. Nothing is retried here.

use super::FORWARD_LIMIT;
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

/// How long a run of containerd's program may take. It is some 40 MB to load, for each event: a loaded machine takes seconds.
const PROGRAM_LIMIT: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Nobody wants them.
    Nowhere,
    /// A ttrpc socket, with `unix://`.
    Socket(String),
    /// containerd's program (flag `-publish-binary`) and its socket.
    Program { path: PathBuf, address: String },
}

impl Way {
    /// The way that `start` was told of: `TTRPC_ADDRESS` first, as containerd's documentation of runtime v2 wants it.
    pub fn new(ttrpc: &str, program: &str, address: &str) -> Self {
        let path = plain(ttrpc);
        match (path.is_empty(), program.is_empty()) {
            (false, _) => Self::Socket(format!("unix://{path}")),
            (true, false) => Self::Program {
                path: program.into(),
                address: address.to_owned(),
            },
            (true, true) => Self::Nowhere,
        }
    }
}

/// A socket's path.
fn plain(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

/// Why an event was not taken.
pub(super) enum Failure {
    /// Nobody there, or the connection broke.
    Away,
    /// The daemon answered with an error.
    Refused(ttrpc::Error),
}

/// A way with what is kept open on it.
pub(super) struct Sender {
    way: Way,
    client: Option<EventsClient>,
}

impl Sender {
    pub(super) fn new(way: Way) -> Self {
        Self { way, client: None }
    }

    /// Hands one event over, within [`FORWARD_LIMIT`] or [`PROGRAM_LIMIT`]. Dropped, it may have arrived or not.
    pub(super) async fn send(&mut self, envelope: Envelope) -> Result<(), Failure> {
        let limit = match self.way {
            Way::Nowhere | Way::Socket(_) => FORWARD_LIMIT,
            Way::Program { .. } => PROGRAM_LIMIT,
        };
        let sent = async {
            match self.way.clone() {
                Way::Nowhere => Ok(()),
                Way::Socket(address) => self.forward(&address, envelope).await,
                Way::Program { path, address } => publish(&path, &address, envelope).await,
            }
        };
        let result = tokio::time::timeout(limit, sent).await;
        let result = result.unwrap_or(Err(Failure::Away));
        if result.is_err() {
            self.client = None;
        }
        result
    }

    async fn forward(&mut self, address: &str, envelope: Envelope) -> Result<(), Failure> {
        let connected = match &self.client {
            Some(connected) => connected.clone(),
            None => {
                let fresh =
                    EventsClient::new(Client::connect(address).await.map_err(|_| Failure::Away)?);
                self.client.insert(fresh).clone()
            }
        };
        let request = ForwardRequest {
            envelope: MessageField::some(envelope),
            ..Default::default()
        };
        let context = ttrpc::context::with_duration(FORWARD_LIMIT);
        match connected.forward(context, &request).await {
            Ok(_) => Ok(()),
            Err(error @ ttrpc::Error::RpcStatus(_)) => Err(Failure::Refused(error)),
            Err(_) => Err(Failure::Away),
        }
    }
}

/// Runs containerd's program once, with the event's Any on its standard input.
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
        .map_err(|_| Failure::Away)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ended early tells so by its exit code.
        drop(stdin.write_all(&event).await);
    }
    match child.wait().await {
        Ok(status) if status.success() => Ok(()),
        // The program cannot say it: where its daemon is away the event waits for it, as on the other way.
        Ok(_) if UnixStream::connect(plain(address)).await.is_err() => Err(Failure::Away),
        Ok(status) => Err(Failure::Refused(ttrpc::Error::Others(format!(
            "{} publish: {status}",
            path.display()
        )))),
        Err(_) => Err(Failure::Away),
    }
}
