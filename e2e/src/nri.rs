//! An NRI plugin that a test plays: it connects to a node's socket, writes down what it is told, and answers by a script. And
//! one that the daemon launches itself: this very program, by [`launched`].
//!
//! Its messages are written here by number, as far as the cases need them: a second opinion on the wire, like the CRI client's. What is
//! right or wrong is the cases' to say.

use crate::outcome::{During, Result};
use crate::{ensure, wait};
use boxlite_sys::sync::Mutex;
use prost::Message;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;
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

/// ConfigureRequest, in part.
#[derive(Clone, PartialEq, Message)]
struct Configure {
    #[prost(string, tag = "1")]
    config: String,
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

/// LinuxContainerAdjustment, LinuxResources, LinuxMemory and OptionalInt64, in part.
#[derive(Clone, PartialEq, Message)]
pub struct Linux {
    #[prost(message, optional, tag = "2")]
    pub resources: Option<Resources>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Resources {
    #[prost(message, optional, tag = "1")]
    pub memory: Option<Memory>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Memory {
    #[prost(message, optional, tag = "1")]
    pub limit: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
pub struct Number {
    #[prost(int64, tag = "1")]
    pub value: i64,
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
    #[prost(message, optional, tag = "6")]
    pub linux: Option<Linux>,
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

type Script<'a> = dyn Fn(&str) -> Reply + Send + Sync + 'a;

#[derive(Default)]
struct Seen {
    /// `method id`, where the id is the container's or else the pod's.
    events: Vec<String>,
    /// Ids of the synchronization; none before it.
    present: Option<Vec<String>>,
    /// Its configuration file.
    config: String,
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
        register(&mut stream, index, name).await?;
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
        self.seen.lock()
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

async fn register(stream: &mut UnixStream, index: &str, name: &str) -> Result {
    let register = Register {
        name: name.into(),
        index: index.into(),
    };
    let request = Request {
        service: "nri.pkg.api.v1alpha1.Runtime".into(),
        method: "RegisterPlugin".into(),
        payload: register.encode_to_vec(),
    };
    send(stream, RUNTIME, 1, 1, &request.encode_to_vec()).await
}

/// Puts a program into `plugins` that the daemon launches as the plugin `NN-name`; it leaves word in `notes`.
pub fn install(plugins: &Path, full_name: &str, notes: &Path) -> Result {
    std::fs::create_dir_all(plugins)?;
    std::fs::create_dir_all(notes)?;
    let program = std::env::current_exe()?;
    let (program, notes) = (program.display(), notes.display());
    // The connection is descriptor 3.
    let script = format!("#!/bin/sh\nexec {program} nri-plugin {notes} <&3\n");
    let path = plugins.join(full_name);
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// What such a program does: it registers by its environment on its standard input, sets the variable `<NAME>` of each container
/// to its configuration, and writes its pid, what was present, and every event into files of `notes`. Ends with the connection.
pub async fn launched(notes: &Path) -> Result {
    let (index, name) = (
        std::env::var("NRI_PLUGIN_IDX")?,
        std::env::var("NRI_PLUGIN_NAME")?,
    );
    let socket = StdUnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(socket)?;
    register(&mut stream, &index, &name).await?;
    std::fs::write(notes.join("pid"), std::process::id().to_string())?;
    let seen = Mutex::new(Seen::default());
    let script = |method: &str| {
        let seen = seen.lock();
        let present = seen.present.clone().unwrap_or_default().join("\n");
        // Whoever waits for a file finds it whole, or finds no plugin.
        let _ = std::fs::write(notes.join("events"), seen.events.join("\n"));
        let _ = std::fs::write(notes.join("present"), format!("{present}\n"));
        match method {
            "CreateContainer" => Reply::Adjust(Adjust {
                env: vec![Pair {
                    key: name.to_uppercase(),
                    value: seen.config.clone(),
                }],
                ..Default::default()
            }),
            _ => Reply::Fine,
        }
    };
    serve(stream, &seen, &script).await
}

async fn serve(mut stream: UnixStream, seen: &Mutex<Seen>, script: &Script<'_>) -> Result {
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

fn heard(request: &Request, seen: &Mutex<Seen>, script: &Script<'_>) -> Result<Reply> {
    let mut seen = seen.lock();
    match &*request.method {
        "Configure" => {
            seen.config = Configure::decode(&request.payload[..])?.config;
            Ok(Reply::Fine)
        }
        "Synchronize" => {
            let state = Synchronize::decode(&request.payload[..])?;
            let all = state.pods.into_iter().chain(state.containers);
            seen.present = Some(all.map(|object| object.id).collect());
            drop(seen);
            Ok(script("Synchronize"))
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
