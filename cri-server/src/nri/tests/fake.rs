//! A scripted plugin at the other end of a socket pair, and a host without pods.
//!
//! It uses the same `wire` module; compatibility with Go plugins is covered by critest.

use super::super::connection::UNIMPLEMENTED;
use super::super::wire::{
    self, Assembler, Message, PLUGIN_SERVICE, REQUEST, RESPONSE, RUNTIME_SERVICE, Request,
    Response, RpcStatus,
};
use super::super::{Host, Limits, Registry};
use boxlite_proto::nri::v1alpha1::*;
use prost::Message as _;
use std::collections::HashMap;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::oneshot;

/// Short enough for tests, long enough for a loaded machine.
pub(crate) const LIMITS: Limits = Limits {
    registration: Duration::from_secs(5),
    request: Duration::from_secs(2),
};

/// Reaction of a plugin to a call.
pub(crate) enum Reply {
    Ok(Vec<u8>),
    Refuse(&'static str),
    Unimplemented,
    Hang,
    Close,
    /// Requests an update from the runtime first, and rejects the call if it fails.
    UpdateFirst(Vec<ContainerUpdate>),
}

/// Returns an empty success.
pub(crate) fn ok(message: impl prost::Message) -> Reply {
    Reply::Ok(message.encode_to_vec())
}

pub(crate) type Script = Arc<dyn Fn(&str, &[u8]) -> Reply + Send + Sync>;
/// Calls as `name method`, in the order of arrival.
pub(crate) type Log = Arc<Mutex<Vec<String>>>;

/// Returns the calls so far, without the handshake.
pub(crate) fn events(log: &Log) -> Vec<String> {
    let log = log.lock().unwrap();
    let handshake =
        |entry: &&String| !entry.ends_with("Configure") && !entry.ends_with("Synchronize");
    log.iter().filter(handshake).cloned().collect()
}

/// A host with scripted answers that records its requests.
#[derive(Debug, Default)]
pub(crate) struct FakeHost {
    pub pods: Mutex<Vec<PodSandbox>>,
    pub containers: Mutex<Vec<Container>>,
    pub updates: Mutex<Vec<ContainerUpdate>>,
}

#[tonic::async_trait]
impl Host for FakeHost {
    async fn snapshot(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        (
            self.pods.lock().unwrap().clone(),
            self.containers.lock().unwrap().clone(),
        )
    }

    async fn update(&self, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate> {
        self.updates.lock().unwrap().extend(updates);
        Vec::new()
    }
}

/// Creates a registry over a host.
pub(crate) fn registry(host: Arc<FakeHost>) -> Arc<Registry> {
    Arc::new(Registry::new(LIMITS, host))
}

/// Connects a plugin; returns whether it was registered.
pub(crate) async fn join(
    registry: &Arc<Registry>,
    index: &'static str,
    name: &'static str,
    mask: i32,
    log: &Log,
    script: impl Fn(&str, &[u8]) -> Reply + Send + Sync + 'static,
) -> bool {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    let plugin = Fake {
        index,
        name,
        mask,
        log: log.clone(),
        script: Arc::new(script),
    };
    tokio::spawn(plugin.run(theirs));
    registry.clone().connect(ours, None).await.is_some()
}

struct Fake {
    index: &'static str,
    name: &'static str,
    mask: i32,
    log: Log,
    script: Script,
}

type Waiting = Arc<Mutex<HashMap<u32, oneshot::Sender<Response>>>>;

impl Fake {
    async fn run(self, socket: StdUnixStream) {
        socket.set_nonblocking(true).unwrap();
        let (mut reader, writer) = UnixStream::from_std(socket).unwrap().into_split();
        let writer = Arc::new(tokio::sync::Mutex::new(writer));
        let pending = Waiting::default();
        let register = RegisterPluginRequest {
            plugin_name: self.name.into(),
            plugin_idx: self.index.into(),
            nri_version: "v0.12.1".into(),
        };
        ask(&writer, 1, "RegisterPlugin", &register).await;
        let (mut calls, mut answers) = (Assembler::default(), Assembler::default());
        while let Ok(Some((connection, bytes))) = wire::read(&mut reader).await {
            if connection == RUNTIME_SERVICE {
                answers.push(&bytes);
                while let Some(message) = answers.next().unwrap() {
                    if let Some(pending) = pending.lock().unwrap().remove(&message.stream) {
                        let _ = pending.send(Response::decode(&message.payload[..]).unwrap());
                    }
                }
                continue;
            }
            calls.push(&bytes);
            while let Some(message) = calls.next().unwrap() {
                assert_eq!((message.kind, message.stream % 2), (REQUEST, 1));
                let request = Request::decode(&message.payload[..]).unwrap();
                assert!(request.timeout_nano > 0);
                let reply = self.reply(&request);
                if matches!(reply, Reply::Close) {
                    return;
                }
                tokio::spawn(answer(
                    writer.clone(),
                    pending.clone(),
                    message.stream,
                    reply,
                ));
            }
        }
    }

    fn reply(&self, request: &Request) -> Reply {
        let entry = format!("{} {}", self.name, request.method);
        self.log.lock().unwrap().push(entry);
        let reply = (self.script)(&request.method, &request.payload);
        match (&*request.method, reply) {
            ("Configure", Reply::Ok(bytes)) if bytes.is_empty() => ok(ConfigureResponse {
                events: self.mask,
                failure_policy: None,
            }),
            (_, reply) => reply,
        }
    }
}

async fn ask(
    writer: &tokio::sync::Mutex<OwnedWriteHalf>,
    stream: u32,
    method: &str,
    request: &impl prost::Message,
) {
    let payload = Request {
        service: "nri.pkg.api.v1alpha1.Runtime".into(),
        method: method.into(),
        payload: request.encode_to_vec(),
        timeout_nano: 0,
    }
    .encode_to_vec();
    let message = Message {
        stream,
        kind: REQUEST,
        payload,
    };
    let mut writer = writer.lock().await;
    // If the runtime has closed already, the test notices it there.
    let _ = wire::write(&mut *writer, RUNTIME_SERVICE, &message).await;
}

async fn answer(
    writer: Arc<tokio::sync::Mutex<OwnedWriteHalf>>,
    pending: Waiting,
    stream: u32,
    reply: Reply,
) {
    let refuse = |code, message: &str| Response {
        status: Some(RpcStatus {
            code,
            message: message.into(),
        }),
        payload: Vec::new(),
    };
    let response = match reply {
        Reply::Ok(payload) => Response {
            status: None,
            payload,
        },
        Reply::Refuse(message) => refuse(2, message),
        Reply::Unimplemented => refuse(UNIMPLEMENTED, "unimplemented"),
        Reply::UpdateFirst(update) => {
            let (sender, answered) = oneshot::channel();
            pending.lock().unwrap().insert(3, sender);
            let request = UpdateContainersRequest {
                update,
                ..Default::default()
            };
            ask(&writer, 3, "UpdateContainers", &request).await;
            match answered.await.unwrap().status {
                None => Response::default(),
                Some(status) => refuse(2, &status.message),
            }
        }
        Reply::Hang | Reply::Close => return,
    };
    let message = Message {
        stream,
        kind: RESPONSE,
        payload: response.encode_to_vec(),
    };
    let mut writer = writer.lock().await;
    let _ = wire::write(&mut *writer, PLUGIN_SERVICE, &message).await;
}
