//! NRI plugins: one run by a test, which connects to a node's socket, records its events and answers from a script, and
//! one launched by the daemon: this program, through [`launched`].
//!
//! The message definitions are independent of the product's and cover only the fields that the cases need. The cases
//! make the assertions.

use crate::failure::{During, Result};
use crate::{ensure, poll};
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

/// Connection id of the plugin service in the multiplexer.
const PLUGIN: u32 = 1;
const RUNTIME: u32 = 2;
/// Bytes that are no frame: a length beyond every limit.
pub(crate) const NOISE: [u8; 64] = [0xff; 64];
/// Time limit for registration and synchronization.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

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
    pods: Vec<PodObject>,
    #[prost(message, repeated, tag = "2")]
    containers: Vec<Object>,
}

/// Subset of ConfigureRequest.
#[derive(Clone, PartialEq, Message)]
struct Configure {
    #[prost(string, tag = "1")]
    config: String,
}

/// Common fields of all events: a pod and optionally a container.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(message, optional, tag = "1")]
    pod: Option<PodObject>,
    #[prost(message, optional, tag = "2")]
    container: Option<Object>,
}

#[derive(Clone, PartialEq, Message)]
struct Object {
    #[prost(string, tag = "1")]
    id: String,
}

/// Subset of PodSandbox, LinuxPodSandbox and LinuxNamespace.
#[derive(Clone, PartialEq, Message)]
struct PodObject {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPod>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPod {
    #[prost(message, repeated, tag = "5")]
    namespaces: Vec<Namespace>,
}

#[derive(Clone, PartialEq, Message)]
struct Namespace {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "2")]
    path: String,
}

impl PodObject {
    /// Returns `<id> <method>`, followed by the path of each network namespace.
    fn network(&self, method: &str) -> String {
        let mut text = format!("{} {method}", self.id);
        let namespaces = self.linux.iter().flat_map(|linux| &linux.namespaces);
        for namespace in namespaces.filter(|namespace| namespace.kind == "network") {
            text.push_str(&format!(" {}", namespace.path));
        }
        text
    }
}

/// CreateContainerResponse.
#[derive(Clone, PartialEq, Message)]
struct Created {
    #[prost(message, optional, tag = "1")]
    adjust: Option<Adjust>,
}

/// Subset of LinuxContainerAdjustment, LinuxResources, LinuxMemory and OptionalInt64.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Linux {
    #[prost(message, optional, tag = "2")]
    pub resources: Option<Resources>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Resources {
    #[prost(message, optional, tag = "1")]
    pub memory: Option<Memory>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Memory {
    #[prost(message, optional, tag = "1")]
    pub limit: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Number {
    #[prost(int64, tag = "1")]
    pub value: i64,
}

/// Subset of ContainerAdjustment.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Adjust {
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
pub(crate) struct Mount {
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
pub(crate) struct Pair {
    #[prost(string, tag = "1")]
    pub key: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Hooks {
    #[prost(message, repeated, tag = "1")]
    pub prestart: Vec<Hook>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Hook {
    #[prost(string, tag = "1")]
    pub path: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Rlimit {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(uint64, tag = "2")]
    pub hard: u64,
    #[prost(uint64, tag = "3")]
    pub soft: u64,
}

/// Reaction of a plugin to an event.
#[derive(Clone)]
pub(crate) enum Reply {
    /// Accept.
    Fine,
    /// Refuse with this error.
    Refuse(&'static str),
    /// Never answer.
    Hang,
    /// Answer with bytes that are no message.
    Noise,
    /// Send half an answer and disconnect.
    Vanish,
    /// Adjust the container.
    Adjust(Adjust),
}

type Script<'a> = dyn Fn(&str) -> Reply + Send + Sync + 'a;

#[derive(Default)]
struct Recorded {
    /// `method id`, with the id of the container or otherwise the pod.
    events: Vec<String>,
    /// Network namespaces of the pods; see [`PodObject::network`].
    networks: Vec<String>,
    /// Ids of the synchronization, `None` before it.
    present: Option<Vec<String>>,
    /// Content of its configuration file.
    config: String,
}

/// A registered plugin.
pub(crate) struct Plugin {
    seen: Arc<Mutex<Recorded>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Plugin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Plugin {
    /// Connects and waits until the plugin is synchronized.
    pub(crate) async fn join(
        socket: &Path,
        index: &str,
        name: &str,
        script: impl Fn(&str) -> Reply + Send + Sync + 'static,
    ) -> Result<Self> {
        let mut stream = UnixStream::connect(socket).await.during(socket.display())?;
        register(&mut stream, index, name).await?;
        let seen = Arc::new(Mutex::new(Recorded::default()));
        let task = tokio::spawn({
            let seen = seen.clone();
            // Ends with the connection; the case detects missing events.
            async move { drop(serve(stream, &seen, &script).await) }
        });
        let plugin = Self { seen, task };
        poll::until("the plugin is synchronized", JOIN_TIMEOUT, || async {
            ensure!(plugin.lock().present.is_some(), "not yet");
            Ok(())
        })
        .await?;
        Ok(plugin)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Recorded> {
        self.seen.lock()
    }

    /// Returns the methods of the events with these ids, in order.
    pub(crate) fn events(&self, ids: &[&str]) -> Vec<String> {
        let about = |entry: &&String| ids.iter().any(|id| entry.ends_with(*id));
        let method = |entry: &String| entry.split(' ').next().unwrap_or_default().to_owned();
        self.lock()
            .events
            .iter()
            .filter(about)
            .map(method)
            .collect()
    }

    /// Returns the events of the pod, each followed by the paths of its network namespaces.
    pub(crate) fn networks(&self, pod: &str) -> Vec<String> {
        let seen = self.lock();
        let of_pod = seen.networks.iter().filter_map(|entry| {
            let entry = entry.strip_prefix(pod)?;
            entry.strip_prefix(' ').map(str::to_owned)
        });
        of_pod.collect()
    }

    /// Returns the ids received in the synchronization.
    pub(crate) fn present(&self) -> Vec<String> {
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

/// Installs a program in `plugins` that the daemon launches as the plugin `NN-name`. It writes its records to `notes`.
pub(crate) fn install(plugins: &Path, full_name: &str, notes: &Path) -> Result {
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

/// Runs the launched plugin: registers by its environment on its standard input, sets the variable `<NAME>` of each
/// container to its configuration, and writes its pid, the synchronized ids and every event to files in `notes`. Ends
/// with the connection.
pub(crate) async fn launched(notes: &Path) -> Result {
    let (index, name) = (
        std::env::var("NRI_PLUGIN_IDX")?,
        std::env::var("NRI_PLUGIN_NAME")?,
    );
    let socket = StdUnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(socket)?;
    register(&mut stream, &index, &name).await?;
    std::fs::write(notes.join("pid"), std::process::id().to_string())?;
    let seen = Mutex::new(Recorded::default());
    let script = |method: &str| {
        let seen = seen.lock();
        let present = seen.present.clone().unwrap_or_default().join("\n");
        // Errors are ignored: the case then finds no record of the plugin.
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

async fn serve(mut stream: UnixStream, seen: &Mutex<Recorded>, script: &Script<'_>) -> Result {
    let (mut connection, mut bytes) = (0, Vec::new());
    loop {
        // The runtime sends each message in a separate frame, one at a time.
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
        let reply = handle(&request, seen, script)?;
        let response = match reply {
            Reply::Hang => continue,
            Reply::Noise => {
                stream.write_all(&NOISE).await?;
                continue;
            }
            Reply::Vanish => {
                let answer = frame(PLUGIN, id, 2, &Response::default().encode_to_vec())?;
                stream.write_all(&answer[..answer.len() / 2]).await?;
                return Ok(());
            }
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

fn handle(request: &Request, seen: &Mutex<Recorded>, script: &Script<'_>) -> Result<Reply> {
    let mut seen = seen.lock();
    match &*request.method {
        "Configure" => {
            seen.config = Configure::decode(&request.payload[..])?.config;
            Ok(Reply::Fine)
        }
        "Synchronize" => {
            let state = Synchronize::decode(&request.payload[..])?;
            let networks = state.pods.iter().map(|pod| pod.network("Synchronize"));
            seen.networks.extend(networks);
            let pods = state.pods.into_iter().map(|pod| pod.id);
            let containers = state.containers.into_iter().map(|object| object.id);
            seen.present = Some(pods.chain(containers).collect());
            drop(seen);
            Ok(script("Synchronize"))
        }
        method => {
            let event = Event::decode(&request.payload[..])?;
            if event.container.is_none() {
                seen.networks
                    .extend(event.pod.iter().map(|pod| pod.network(method)));
            }
            let pod = event.pod.map(|pod| pod.id);
            let id = event.container.map(|object| object.id).or(pod);
            seen.events
                .push(format!("{method} {}", id.unwrap_or_default()));
            drop(seen);
            Ok(script(method))
        }
    }
}

/// Returns the length in the first four bytes.
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
    let bytes = frame(connection, id, kind, payload)?;
    Ok(stream.write_all(&bytes).await?)
}

/// Returns a frame of the multiplexer with one ttrpc message.
fn frame(connection: u32, id: u32, kind: u8, payload: &[u8]) -> Result<Vec<u8>> {
    let length = u32::try_from(payload.len())?;
    let mut bytes = Vec::new();
    bytes.extend(connection.to_be_bytes());
    bytes.extend((length + 10).to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(id.to_be_bytes());
    bytes.extend([kind, 0]);
    bytes.extend(payload);
    Ok(bytes)
}
