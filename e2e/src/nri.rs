//! An NRI plugin that a test plays: it connects to a node's socket, writes down what it is told, and answers by a script.
//!
//! Its messages are written here by number, as far as the cases need them: a second opinion on the wire, like the CRI client's. What is
//! right or wrong is the cases' to say.

use crate::outcome::{During, Result};
use crate::{ensure, wait};
use prost::Message;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Connections on the trunk.
const PLUGIN: u32 = 1;
const RUNTIME: u32 = 2;
/// Time for a registration with synchronization.
const JOIN: Duration = Duration::from_secs(30);

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(string, tag = "1")]
    service: String,
    #[prost(string, tag = "2")]
    method: String,
    #[prost(bytes = "vec", tag = "3")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    payload: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct Status {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct Register {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    index: String,
}

#[derive(Clone, PartialEq, Message)]
struct Synchronize {
    #[prost(message, repeated, tag = "1")]
    pods: Vec<Object>,
    #[prost(message, repeated, tag = "2")]
    containers: Vec<Object>,
}

/// What every event has: a pod, perhaps a container.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(message, optional, tag = "1")]
    pod: Option<Object>,
    #[prost(message, optional, tag = "2")]
    container: Option<Object>,
}

#[derive(Clone, PartialEq, Message)]
struct Object {
    #[prost(string, tag = "1")]
    id: String,
}

/// CreateContainerResponse.
#[derive(Clone, PartialEq, Message)]
struct Created {
    #[prost(message, optional, tag = "1")]
    adjust: Option<Adjust>,
}

/// ContainerAdjustment, in part.
#[derive(Clone, PartialEq, Message)]
pub struct Adjust {
    #[prost(message, repeated, tag = "3")]
    pub mounts: Vec<Mount>,
    #[prost(message, repeated, tag = "4")]
    pub env: Vec<Pair>,
    #[prost(message, optional, tag = "5")]
    pub hooks: Option<Hooks>,
    #[prost(message, repeated, tag = "7")]
    pub rlimits: Vec<Rlimit>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub destination: String,
    #[prost(string, tag = "2")]
    pub kind: String,
    #[prost(string, tag = "3")]
    pub source: String,
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Pair {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Hooks {
    #[prost(message, repeated, tag = "1")]
    pub prestart: Vec<Hook>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Hook {
    #[prost(string, tag = "1")]
    pub path: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct Rlimit {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(uint64, tag = "2")]
    pub hard: u64,
    #[prost(uint64, tag = "3")]
    pub soft: u64,
}

/// What a plugin does with an event.
#[derive(Clone)]
pub enum Reply {
    /// Nothing against it.
    Fine,
    /// Says no.
    Refuse(&'static str),
    /// Never answers.
    Hang,
    /// Wants the container so.
    Adjust(Adjust),
}

type Script = dyn Fn(&str) -> Reply + Send + Sync;

#[derive(Default)]
struct Seen {
    /// `method id`, where the id is the container's or else the pod's.
    events: Vec<String>,
    /// Ids of the synchronization; none before it.
    present: Option<Vec<String>>,
}

/// A plugin that is in.
pub struct Plugin {
    seen: Arc<Mutex<Seen>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Plugin {
    /// Connects and waits until it was synchronized.
    pub async fn join(
        socket: &Path,
        index: &str,
        name: &str,
        script: impl Fn(&str) -> Reply + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut stream = UnixStream::connect(socket).await.during(socket.display())?;
        let register = Register {
            name: name.into(),
            index: index.into(),
        };
        let request = Request {
            service: "nri.pkg.api.v1alpha1.Runtime".into(),
            method: "RegisterPlugin".into(),
            payload: register.encode_to_vec(),
        };
        send(&mut stream, RUNTIME, 1, 1, &request.encode_to_vec()).await?;
        let seen = Arc::new(Mutex::new(Seen::default()));
        let task = tokio::spawn({
            let seen = seen.clone();
            // Its end is the connection's; what is missing then is seen by the case.
            async move { drop(serve(stream, &seen, &script).await) }
        });
        let plugin = Self { seen, task };
        wait::until("the plugin is synchronized", JOIN, || async {
            ensure!(plugin.lock().present.is_some(), "not yet");
            Ok(())
        })
        .await?;
        Ok(plugin)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Methods of the events of these ids, in order.
    pub fn events(&self, ids: &[&str]) -> Vec<String> {
        let about = |entry: &&String| ids.iter().any(|id| entry.ends_with(*id));
        let method = |entry: &String| entry.split(' ').next().unwrap_or_default().to_owned();
        self.lock()
            .events
            .iter()
            .filter(about)
            .map(method)
            .collect()
    }

    /// What was there when it came.
    pub fn present(&self) -> Vec<String> {
        self.lock().present.clone().unwrap_or_default()
    }
}

async fn serve(mut stream: UnixStream, seen: &Mutex<Seen>, script: &Script) -> Result {
    let (mut connection, mut bytes) = (0, Vec::new());
    loop {
        // The runtime begins each message with a frame of its own and sends one message at a time.
        while bytes.len() < 10 || bytes.len() < 10 + number(&bytes) {
            let mut header = [0; 8];
            stream.read_exact(&mut header).await?;
            connection = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
            let mut frame = vec![0; number(&header[4..])];
            stream.read_exact(&mut frame).await?;
            bytes.extend(frame);
        }
        let message = std::mem::take(&mut bytes);
        if connection != PLUGIN {
            continue;
        }
        let id = u32::from_be_bytes([message[4], message[5], message[6], message[7]]);
        let request = Request::decode(&message[10..])?;
        let reply = heard(&request, seen, script)?;
        let response = match reply {
            Reply::Hang => continue,
            Reply::Fine => Response::default(),
            Reply::Refuse(words) => Response {
                status: Some(Status {
                    code: 2,
                    message: words.into(),
                }),
                payload: Vec::new(),
            },
            Reply::Adjust(adjust) => Response {
                status: None,
                payload: Created {
                    adjust: Some(adjust),
                }
                .encode_to_vec(),
            },
        };
        send(&mut stream, PLUGIN, id, 2, &response.encode_to_vec()).await?;
    }
}

fn heard(request: &Request, seen: &Mutex<Seen>, script: &Script) -> Result<Reply> {
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    match &*request.method {
        "Configure" => Ok(Reply::Fine),
        "Synchronize" => {
            let state = Synchronize::decode(&request.payload[..])?;
            let all = state.pods.into_iter().chain(state.containers);
            seen.present = Some(all.map(|object| object.id).collect());
            Ok(Reply::Fine)
        }
        method => {
            let event = Event::decode(&request.payload[..])?;
            let object = event.container.or(event.pod).unwrap_or_default();
            seen.events.push(format!("{method} {}", object.id));
            drop(seen);
            Ok(script(method))
        }
    }
}

/// The four bytes at the start.
fn number(bytes: &[u8]) -> usize {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize
}

async fn send(
    stream: &mut UnixStream,
    connection: u32,
    id: u32,
    kind: u8,
    payload: &[u8],
) -> Result {
    let length = u32::try_from(payload.len())?;
    let mut bytes = Vec::new();
    bytes.extend(connection.to_be_bytes());
    bytes.extend((length + 10).to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(id.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    stream.write_all(&bytes).await?;
    Ok(())
}
