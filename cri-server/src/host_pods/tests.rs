//! Tests of the router with a fake containerd on a socket, and a runtime without pods on the other side.

mod fake;

use super::*;
use crate::service::tests::Fixture;
use boxlite_proto::cri::v1::image_service_server::ImageService;
use boxlite_proto::cri::v1::runtime_service_server::RuntimeService;
use boxlite_proto::cri::v1::*;
use fake::FakeContainerd;
use futures::StreamExt;
use std::time::Duration;
use tonic::{Code, Request, Response, Status};

/// Longest wait of a test.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A router, its runtime and its fake containerd.
struct Node {
    router: Router,
    fixture: Fixture,
    containerd: FakeContainerd,
}

impl Node {
    async fn new() -> Self {
        let fixture = Fixture::new().await;
        let containerd = FakeContainerd::start(&fixture.dir.path().join("c.sock"));
        let router = router(&fixture);
        Self {
            router,
            fixture,
            containerd,
        }
    }

    async fn run(&self, name: &str, handler: &str) -> Result<String, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config(name)),
            runtime_handler: handler.into(),
        };
        let answer = self.router.run_pod_sandbox(Request::new(request)).await?;
        Ok(answer.into_inner().pod_sandbox_id)
    }

    async fn create(&self, pod: &str, image: &str) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(ContainerConfig {
                image: Some(spec(image)),
                ..Default::default()
            }),
            sandbox_config: Some(config("web")),
        };
        let answer = self.router.create_container(Request::new(request)).await?;
        Ok(answer.into_inner().container_id)
    }

    async fn pods(&self) -> Vec<PodSandbox> {
        let list = self.router.list_pod_sandbox(Request::new(<_>::default()));
        list.await.unwrap().into_inner().items
    }

    async fn containers(&self) -> Vec<Container> {
        let list = self.router.list_containers(Request::new(<_>::default()));
        list.await.unwrap().into_inner().containers
    }

    async fn status(&self, pod: &str) -> Result<Response<PodSandboxStatusResponse>, Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.into(),
            verbose: false,
        };
        self.router.pod_sandbox_status(Request::new(request)).await
    }

    async fn stop(&self, pod: &str) -> Result<Response<StopPodSandboxResponse>, Status> {
        let pod_sandbox_id = pod.into();
        let request = StopPodSandboxRequest { pod_sandbox_id };
        self.router.stop_pod_sandbox(Request::new(request)).await
    }
}

/// Returns a new router over the fixture, as a restart of the daemon makes it.
fn router(fixture: &Fixture) -> Router {
    let config = HostPodsConfig {
        endpoint: Some(fixture.dir.path().join("c.sock")),
        handlers: vec!["runc".into()],
        namespaces: vec!["kube-system".into()],
    };
    let table = fixture.dir.path().join("root/host-pods.pb");
    Router::new(fixture.server.clone(), &config, table)
}

fn config(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            namespace: "default".into(),
            uid: format!("uid-{name}"),
            attempt: 0,
        }),
        ..Default::default()
    }
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.into(),
        ..Default::default()
    }
}

fn code<T>(answer: &Result<T, Status>) -> Code {
    answer.as_ref().err().map_or(Code::Ok, Status::code)
}

#[tokio::test]
async fn run_pod_sandbox_goes_to_the_selected_side() {
    let node = Node::new().await;
    let id = node.run("web", "runc").await.unwrap();
    assert_eq!(node.containerd.calls("RunPodSandbox"), 1);
    // A VM, for which this node lacks a network.
    let vm = node.run("vm", "boxlite").await;
    assert_eq!(code(&vm), Code::FailedPrecondition);
    assert_eq!(node.containerd.calls("RunPodSandbox"), 1);
    // A call by a prefix of the id arrives with the whole id.
    assert!(node.status(&id[..10]).await.is_ok());
    assert_eq!(node.containerd.last_id("PodSandboxStatus"), id);
    // Ids that nothing has are answered by this runtime.
    let unknown = "ab".repeat(32);
    assert_eq!(code(&node.status(&unknown).await), Code::NotFound);
    assert!(node.stop(&unknown).await.is_ok());
    assert_eq!(node.containerd.calls("StopPodSandbox"), 0);
    assert!(node.stop(&id).await.is_ok());
    assert_eq!(node.containerd.calls("StopPodSandbox"), 1);
    let request = RemovePodSandboxRequest {
        pod_sandbox_id: id.clone(),
    };
    node.router
        .remove_pod_sandbox(Request::new(request))
        .await
        .unwrap();
    assert_eq!(code(&node.status(&id).await), Code::NotFound);
}

#[tokio::test]
async fn containerd_errors_pass_unchanged() {
    let node = Node::new().await;
    let id = node.run("web", "runc").await.unwrap();
    node.containerd
        .fail("PodSandboxStatus", Code::Internal, "on purpose");
    let error = node.status(&id).await.unwrap_err();
    assert_eq!(
        (error.code(), error.message()),
        (Code::Internal, "on purpose")
    );
}

#[tokio::test]
async fn dead_containerd_makes_only_its_pods_unknown() {
    let node = Node::new().await;
    let pod = node.run("web", "runc").await.unwrap();
    node.containerd.add_image("sha256:1", &["r/x:1"]);
    let container = node.create(&pod, "r/x:1").await.unwrap();
    assert_eq!(node.pods().await.len(), 1);
    let Node {
        fixture,
        containerd,
        ..
    } = node;
    containerd.stop().await;
    // A restart of the daemon, too, which reads the table.
    let socket = fixture.dir.path().join("c.sock");
    let node = Node {
        router: router(&fixture),
        containerd: FakeContainerd::start(&fixture.dir.path().join("other.sock")),
        fixture,
    };
    let pods = node.pods().await;
    assert_eq!((pods.len(), &pods[0].id), (1, &pod));
    assert_eq!(pods[0].state, PodSandboxState::SandboxNotready as i32);
    let containers = node.containers().await;
    assert_eq!((containers.len(), &containers[0].id), (1, &container));
    let unknown = ContainerState::ContainerUnknown as i32;
    assert_eq!(containers[0].state, unknown);
    for error in [
        node.status(&pod).await.map(drop).unwrap_err(),
        node.stop(&pod).await.map(drop).unwrap_err(),
        node.run("more", "runc").await.map(drop).unwrap_err(),
    ] {
        assert_eq!(error.code(), Code::Unavailable);
        let endpoint = format!("unix://{}", socket.display());
        assert!(error.message().contains(&endpoint), "{}", error.message());
    }
    assert!(node.stop(&"ab".repeat(32)).await.is_ok());
    assert_eq!(code(&node.run("vm", "").await), Code::FailedPrecondition);
    let status = node
        .router
        .status(Request::new(StatusRequest { verbose: true }));
    let status = status.await.unwrap().into_inner();
    let conditions = status.status.unwrap().conditions;
    let of = |kind: &str| conditions.iter().find(|c| c.r#type == kind).unwrap();
    assert!(of("RuntimeReady").status && !of("HostPodsReady").status);
    let handlers: Vec<_> = status
        .runtime_handlers
        .iter()
        .map(|h| &h.name[..])
        .collect();
    assert_eq!(handlers, ["", "boxlite", "runc"]);
    // It comes back: the pods are known again.
    let again = FakeContainerd::start(&socket);
    again.add_pod(&pod);
    let pods = node.pods().await;
    assert_eq!(pods[0].state, PodSandboxState::SandboxReady as i32);
    assert!(node.status(&pod).await.is_ok());
}

#[tokio::test]
async fn pods_of_containerd_are_adopted_by_a_list() {
    let node = Node::new().await;
    let id = "cd".repeat(32);
    node.containerd.add_pod(&id);
    assert_eq!(code(&node.status(&id).await), Code::NotFound);
    node.router.start().await;
    assert!(node.status(&id).await.is_ok());
}

#[tokio::test]
async fn image_of_the_other_store_is_pulled_by_digest() {
    let node = Node::new().await;
    let pod = node.run("web", "runc").await.unwrap();
    // In neither store: the error is containerd's.
    assert_eq!(code(&node.create(&pod, "r/none:1").await), Code::NotFound);
    assert_eq!(node.containerd.calls("PullImage"), 0);
    // A pull for the pod goes to containerd, one without a pod does not.
    let pull = |sandbox_config| {
        Request::new(PullImageRequest {
            image: Some(spec("r/x:1")),
            auth: None,
            sandbox_config,
        })
    };
    let pulled = node.router.pull_image(pull(Some(config("web")))).await;
    assert_eq!(pulled.unwrap().into_inner().image_ref, "sha256:r/x:1");
    assert_eq!(node.containerd.calls("PullImage"), 1);
    assert!(node.router.pull_image(pull(None)).await.is_err());
    assert_eq!(node.containerd.calls("PullImage"), 1);
    assert!(node.create(&pod, "sha256:r/x:1").await.is_ok());
}

#[tokio::test]
async fn missing_image_is_reported_until_it_is_pulled() {
    let node = Node::new().await;
    node.containerd.add_image("sha256:r/x:1", &["r/x:1"]);
    let status = || async {
        let request = ImageStatusRequest {
            image: Some(spec("r/x:1")),
            verbose: false,
        };
        let answer = node.router.image_status(Request::new(request)).await;
        answer.unwrap().into_inner().image
    };
    assert!(status().await.is_some());
    // For a VM: this runtime cannot pull it, since the registry does not exist.
    let mut request = CreateContainerRequest {
        config: Some(ContainerConfig {
            image: Some(spec("r/x:1")),
            ..Default::default()
        }),
        ..Default::default()
    };
    let side = lookup::Side::Vm;
    let error = node.router.provide_images(&side, &mut request).await;
    assert_eq!(code(&error), Code::NotFound);
    assert!(status().await.is_none());
    let pod = node.run("web", "runc").await.unwrap();
    assert!(!pod.is_empty());
    let pull = PullImageRequest {
        image: Some(spec("r/x:1")),
        auth: None,
        sandbox_config: Some(config("web")),
    };
    node.router.pull_image(Request::new(pull)).await.unwrap();
    assert!(status().await.is_some());
    // Removed from containerd, too.
    let image = Some(spec("r/x:1"));
    let remove = RemoveImageRequest { image };
    node.router
        .remove_image(Request::new(remove))
        .await
        .unwrap();
    assert!(status().await.is_none());
}

#[tokio::test]
async fn events_of_containerd_survive_its_restart() {
    let node = Node::new().await;
    let events = node
        .router
        .get_container_events(Request::new(GetEventsRequest {}));
    let mut events = events.await.unwrap().into_inner();
    let socket = node.fixture.dir.path().join("c.sock");
    node.containerd.emit("c1");
    let next = tokio::time::timeout(TEST_TIMEOUT, events.next())
        .await
        .unwrap();
    assert_eq!(next.unwrap().unwrap().container_id, "c1");
    node.containerd.stop().await;
    let again = FakeContainerd::start(&socket);
    again.emit("c2");
    let next = tokio::time::timeout(TEST_TIMEOUT, events.next())
        .await
        .unwrap();
    assert_eq!(next.unwrap().unwrap().container_id, "c2");
    // The end of this runtime's events ends the stream.
    node.fixture.server.close_streams();
    let end = tokio::time::timeout(TEST_TIMEOUT, events.next())
        .await
        .unwrap();
    assert!(end.is_none());
}

#[tokio::test]
async fn runtime_config_follows_containerd() {
    let node = Node::new().await;
    let driver = |router: Router| async move {
        let answer = router.runtime_config(Request::new(RuntimeConfigRequest {}));
        let linux = answer.await.unwrap().into_inner().linux;
        linux.unwrap().cgroup_driver()
    };
    assert_eq!(driver(node.router.clone()).await, CgroupDriver::Systemd);
    node.containerd.stop().await;
    assert_eq!(driver(router(&node.fixture)).await, CgroupDriver::Systemd);
}

#[tokio::test]
async fn router_without_endpoint_is_the_runtime() {
    let fixture = Fixture::new().await;
    let table = fixture.dir.path().join("root/host-pods.pb");
    let router = Router::new(
        fixture.server.clone(),
        &HostPodsConfig::default(),
        table.clone(),
    );
    router.start().await;
    let request = RunPodSandboxRequest {
        config: Some(config("web")),
        runtime_handler: "runc".into(),
    };
    let error = router.run_pod_sandbox(Request::new(request)).await;
    assert_eq!(code(&error), Code::InvalidArgument);
    let status = router.status(Request::new(StatusRequest { verbose: true }));
    let status = status.await.unwrap().into_inner();
    assert_eq!(status.status.unwrap().conditions.len(), 2);
    assert!(!table.exists());
}
