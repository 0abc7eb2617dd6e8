//! A CRI server in place of containerd: it answers the calls of these tests from memory, with ids as containerd's.

use boxlite_proto::cri::v1::*;
use boxlite_sys::sync::Mutex;
use bytes::{Buf, Bytes};
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use prost::Message;
use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, HeaderValue, Request, Response};
use tonic::server::NamedService;
use tonic::{Code, Status};

/// The server. Dropping it ends its task, and breaks its connections.
pub(super) struct FakeContainerd {
    state: Arc<State>,
    task: AbortOnDropHandle<()>,
    stop: CancellationToken,
}

struct State {
    entries: Mutex<Entries>,
    /// Container id of the last event; empty before the first.
    events: watch::Sender<String>,
    stop: CancellationToken,
}

#[derive(Default)]
struct Entries {
    pods: Vec<PodSandbox>,
    containers: Vec<Container>,
    images: Vec<Image>,
    /// Methods and messages.
    calls: Vec<(String, Bytes)>,
    failure: Option<(String, Status)>,
}

impl FakeContainerd {
    pub(super) fn start(socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let stop = CancellationToken::new();
        let state = Arc::new(State {
            entries: Mutex::default(),
            events: watch::channel(String::new()).0,
            stop: stop.clone(),
        });
        let serving = tonic::transport::Server::builder()
            .add_service(RuntimeCalls(state.clone()))
            .add_service(ImageCalls(state.clone()))
            .serve_with_incoming_shutdown(
                UnixListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        let task = AbortOnDropHandle::new(tokio::spawn(async move { serving.await.unwrap() }));
        Self { state, task, stop }
    }

    /// Ends the server and its connections.
    pub(super) async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    pub(super) fn add_pod(&self, id: &str) {
        self.state.entries.lock().pods.push(PodSandbox {
            id: id.into(),
            ..Default::default()
        });
    }

    pub(super) fn add_image(&self, id: &str, tags: &[&str]) {
        self.state.entries.lock().images.push(image(id, tags));
    }

    /// Makes a method fail.
    pub(super) fn fail(&self, method: &str, code: Code, message: &str) {
        let failure = (method.to_owned(), Status::new(code, message));
        self.state.entries.lock().failure = Some(failure);
    }

    /// Sends an event to the current and the next followers.
    pub(super) fn emit(&self, container: &str) {
        self.state.events.send_replace(container.to_owned());
    }

    /// Returns the number of calls of a method.
    pub(super) fn calls(&self, method: &str) -> usize {
        let entries = self.state.entries.lock();
        entries
            .calls
            .iter()
            .filter(|(name, _)| name == method)
            .count()
    }

    /// Returns the first field of the last message of a method: the id.
    pub(super) fn last_id(&self, method: &str) -> String {
        let entries = self.state.entries.lock();
        let mut calls = entries.calls.iter().rev();
        let (_, message) = calls.find(|(name, _)| name == method).unwrap();
        id(message)
    }
}

/// Decodes the id of a request, field 1 of every message with one.
fn id(message: &Bytes) -> String {
    StopPodSandboxRequest::decode(message.clone())
        .unwrap()
        .pod_sandbox_id
}

fn image(id: &str, tags: &[&str]) -> Image {
    Image {
        id: id.into(),
        repo_tags: tags.iter().map(|tag| (*tag).to_owned()).collect(),
        // No registry is there.
        repo_digests: vec![format!("127.0.0.1:1/x@sha256:{}", "1".repeat(64))],
        ..Default::default()
    }
}

#[derive(Clone)]
struct RuntimeCalls(Arc<State>);

impl NamedService for RuntimeCalls {
    const NAME: &'static str = "runtime.v1.RuntimeService";
}

#[derive(Clone)]
struct ImageCalls(Arc<State>);

impl NamedService for ImageCalls {
    const NAME: &'static str = "runtime.v1.ImageService";
}

type Answering = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

macro_rules! serve {
    ($service:ident) => {
        impl tower::Service<Request<Body>> for $service {
            type Response = Response<Body>;
            type Error = Infallible;
            type Future = Answering;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: Request<Body>) -> Answering {
                let state = self.0.clone();
                Box::pin(async move { Ok(state.respond(request).await) })
            }
        }
    };
}

serve!(RuntimeCalls);
serve!(ImageCalls);

impl State {
    async fn respond(self: Arc<Self>, request: Request<Body>) -> Response<Body> {
        let method = request.uri().path().rsplit('/').next().unwrap().to_owned();
        let mut message = request.into_body().collect().await.unwrap().to_bytes();
        // The prefix of a gRPC message: compression and length.
        message.advance(5);
        if method == "GetContainerEvents" {
            return self.follow();
        }
        match self.answer(&method, message) {
            Ok(answer) => body(futures::stream::iter([answer]).boxed()),
            Err(status) => status.into_http(),
        }
    }

    fn follow(&self) -> Response<Body> {
        let events = WatchStream::new(self.events.subscribe());
        let events = events.filter(|id| std::future::ready(!id.is_empty()));
        let events = events.map(|container_id| {
            ContainerEventResponse {
                container_id,
                ..Default::default()
            }
            .encode_to_vec()
        });
        body(
            events
                .take_until(self.stop.clone().cancelled_owned())
                .boxed(),
        )
    }

    fn answer(&self, method: &str, message: Bytes) -> Result<Vec<u8>, Status> {
        let mut entries = self.entries.lock();
        entries.calls.push((method.to_owned(), message.clone()));
        if let Some((_, status)) = entries.failure.as_ref().filter(|(name, _)| name == method) {
            return Err(status.clone());
        }
        let serial = entries.calls.len();
        Ok(match method {
            "RunPodSandbox" => {
                let id = format!("{serial:064x}").chars().rev().collect::<String>();
                entries.pods.push(PodSandbox {
                    id: id.clone(),
                    ..Default::default()
                });
                RunPodSandboxResponse { pod_sandbox_id: id }.encode_to_vec()
            }
            "CreateContainer" => {
                let request = CreateContainerRequest::decode(message).unwrap();
                let image = request.config.unwrap().image.unwrap();
                entries.find_image(&image.image)?;
                let id = format!("c{serial:063x}");
                entries.containers.push(Container {
                    id: id.clone(),
                    pod_sandbox_id: request.pod_sandbox_id,
                    ..Default::default()
                });
                CreateContainerResponse { container_id: id }.encode_to_vec()
            }
            "PodSandboxStatus" => {
                let id = id(&message);
                if entries.pods.iter().all(|pod| pod.id != id) {
                    return Err(Status::not_found(id));
                }
                Vec::new()
            }
            "RemovePodSandbox" => {
                let id = id(&message);
                entries.pods.retain(|pod| pod.id != id);
                Vec::new()
            }
            "StopPodSandbox" | "Status" => Vec::new(),
            "ListPodSandbox" => {
                let items = entries.pods.clone();
                ListPodSandboxResponse { items }.encode_to_vec()
            }
            "ListContainers" => {
                let containers = entries.containers.clone();
                ListContainersResponse { containers }.encode_to_vec()
            }
            "RuntimeConfig" => RuntimeConfigResponse {
                linux: Some(LinuxRuntimeConfiguration {
                    cgroup_driver: CgroupDriver::Systemd as i32,
                }),
            }
            .encode_to_vec(),
            "PullImage" => {
                let request = PullImageRequest::decode(message).unwrap();
                let tag = request.image.unwrap().image;
                let image_ref = format!("sha256:{tag}");
                if entries.find_image(&tag).is_err() {
                    entries.images.push(image(&image_ref, &[&tag]));
                }
                PullImageResponse { image_ref }.encode_to_vec()
            }
            "ImageStatus" => {
                let request = ImageStatusRequest::decode(message).unwrap();
                let image = entries.find_image(&request.image.unwrap().image).ok();
                ImageStatusResponse {
                    image,
                    ..Default::default()
                }
                .encode_to_vec()
            }
            "RemoveImage" => {
                let request = RemoveImageRequest::decode(message).unwrap();
                let image = entries.find_image(&request.image.unwrap().image)?;
                entries.images.retain(|known| known.id != image.id);
                Vec::new()
            }
            _ => return Err(Status::unimplemented(method)),
        })
    }
}

impl Entries {
    fn find_image(&self, name: &str) -> Result<Image, Status> {
        let is_named =
            |image: &&Image| image.id == name || image.repo_tags.iter().any(|t| t == name);
        let found = self.images.iter().find(is_named).cloned();
        found.ok_or_else(|| Status::not_found(name))
    }
}

/// Returns a gRPC response of these messages.
fn body(messages: futures::stream::BoxStream<'static, Vec<u8>>) -> Response<Body> {
    let data = messages.map(|message| {
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        bytes.extend(message);
        Ok::<_, Status>(Frame::data(Bytes::from(bytes)))
    });
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let end = futures::stream::iter([Ok(Frame::trailers(trailers))]);
    Response::builder()
        .header("content-type", "application/grpc")
        .body(Body::new(StreamBody::new(data.chain(end))))
        .unwrap()
}
