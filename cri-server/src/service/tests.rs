//! Tests of the services with a real BoxliteRuntime over empty directories; none of them needs a VM.

mod errors;
mod faults;
mod fleet;
mod kubelet;
mod pods;
mod robust;

use super::*;
use crate::convert::status as convert_status;
use boxlite_proto::cri::v1::image_service_server::ImageService;
use boxlite_proto::cri::v1::runtime_service_server::RuntimeService;
use boxlite_proto::cri::v1::*;
use boxlite_runtime::RuntimeOptions;
use boxlite_runtime::images::RegistryOptions;
use tempfile::TempDir;
use tonic::{Code, Request, Response};

/// A server over empty directories.
pub(crate) struct Fixture {
    pub server: Server,
    pub dir: TempDir,
}

impl Fixture {
    /// Creates a server without network configuration.
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config {
            root: dir.path().join("root"),
            state: dir.path().join("state"),
            ..Config::default()
        };
        config.cni.conf_dir = dir.path().join("net.d");
        let options = RuntimeOptions {
            root: config.root.clone(),
            state: config.state.clone(),
            scratch_dir: None,
            shim: "/nonexistent/shim".into(),
            installation: crate::serve::installation(&config),
            vmm: boxlite_proto::vmm::VmmKind::Qemu,
            acceleration: boxlite_proto::vmm::Acceleration::Tcg,
            start_limit: config.timeouts.run_pod,
            registry: RegistryOptions::default(),
        };
        let runtime = BoxliteRuntime::open(options).await.unwrap();
        let streaming = Streaming::new(config.streaming, ([127, 0, 0, 1], 1).into());
        let server = Server::new(
            runtime,
            config,
            Arc::new(Metrics::new().unwrap()),
            "test".into(),
            streaming,
        );
        Self { server, dir }
    }
}

fn code<T>(answer: Result<Response<T>, Status>) -> Code {
    answer.err().map_or(Code::Ok, |status| status.code())
}

/// Calls every method of both services with a default request; returns names and codes.
async fn defaults(server: &Server) -> Vec<(&'static str, Code)> {
    let s = server;
    let mut codes = Vec::new();
    macro_rules! ask {
        ($($name:literal $call:ident $request:ident,)*) => {
            $(codes.push(($name, code(s.$call(Request::new($request::default())).await)));)*
        };
    }
    ask! {
        "Version" version VersionRequest,
        "RunPodSandbox" run_pod_sandbox RunPodSandboxRequest,
        "StopPodSandbox" stop_pod_sandbox StopPodSandboxRequest,
        "RemovePodSandbox" remove_pod_sandbox RemovePodSandboxRequest,
        "PodSandboxStatus" pod_sandbox_status PodSandboxStatusRequest,
        "ListPodSandbox" list_pod_sandbox ListPodSandboxRequest,
        "StreamPodSandboxes" stream_pod_sandboxes StreamPodSandboxesRequest,
        "CreateContainer" create_container CreateContainerRequest,
        "StartContainer" start_container StartContainerRequest,
        "StopContainer" stop_container StopContainerRequest,
        "RemoveContainer" remove_container RemoveContainerRequest,
        "ListContainers" list_containers ListContainersRequest,
        "StreamContainers" stream_containers StreamContainersRequest,
        "ContainerStatus" container_status ContainerStatusRequest,
        "UpdateContainerResources" update_container_resources UpdateContainerResourcesRequest,
        "ReopenContainerLog" reopen_container_log ReopenContainerLogRequest,
        "ExecSync" exec_sync ExecSyncRequest,
        "Exec" exec ExecRequest,
        "Attach" attach AttachRequest,
        "PortForward" port_forward PortForwardRequest,
        "ContainerStats" container_stats ContainerStatsRequest,
        "ListContainerStats" list_container_stats ListContainerStatsRequest,
        "StreamContainerStats" stream_container_stats StreamContainerStatsRequest,
        "PodSandboxStats" pod_sandbox_stats PodSandboxStatsRequest,
        "ListPodSandboxStats" list_pod_sandbox_stats ListPodSandboxStatsRequest,
        "StreamPodSandboxStats" stream_pod_sandbox_stats StreamPodSandboxStatsRequest,
        "UpdateRuntimeConfig" update_runtime_config UpdateRuntimeConfigRequest,
        "Status" status StatusRequest,
        "CheckpointContainer" checkpoint_container CheckpointContainerRequest,
        "CheckpointPod" checkpoint_pod CheckpointPodRequest,
        "RestorePod" restore_pod RestorePodRequest,
        "GetContainerEvents" get_container_events GetEventsRequest,
        "ListMetricDescriptors" list_metric_descriptors ListMetricDescriptorsRequest,
        "ListPodSandboxMetrics" list_pod_sandbox_metrics ListPodSandboxMetricsRequest,
        "StreamPodSandboxMetrics" stream_pod_sandbox_metrics StreamPodSandboxMetricsRequest,
        "RuntimeConfig" runtime_config RuntimeConfigRequest,
        "UpdatePodSandboxResources" update_pod_sandbox_resources UpdatePodSandboxResourcesRequest,
        "ListImages" list_images ListImagesRequest,
        "StreamImages" stream_images StreamImagesRequest,
        "ImageStatus" image_status ImageStatusRequest,
        "PullImage" pull_image PullImageRequest,
        "RemoveImage" remove_image RemoveImageRequest,
        "ImageFsInfo" image_fs_info ImageFsInfoRequest,
    }
    codes
}

#[tokio::test]
async fn default_requests_get_expected_codes() {
    let fixture = Fixture::new().await;
    let fine = [
        "Version",
        "ListPodSandbox",
        "StreamPodSandboxes",
        "ListContainers",
        "StreamContainers",
        "ListContainerStats",
        "StreamContainerStats",
        "ListPodSandboxStats",
        "StreamPodSandboxStats",
        "Status",
        "RuntimeConfig",
        "GetContainerEvents",
        "ListMetricDescriptors",
        "ListPodSandboxMetrics",
        "StreamPodSandboxMetrics",
        "ListImages",
        "StreamImages",
        "ImageFsInfo",
    ];
    let missing: Vec<&str> = unimplemented::TABLE.iter().map(|(call, _)| *call).collect();
    for (call, code) in defaults(&fixture.server).await {
        let expected = if fine.contains(&call) {
            Code::Ok
        } else if missing.contains(&call) {
            Code::Unimplemented
        } else {
            Code::InvalidArgument
        };
        assert_eq!(code, expected, "{call}");
    }
}

#[tokio::test]
async fn stop_and_remove_of_unknown_objects_succeed() {
    let server = Fixture::new().await.server;
    let id = "ab".repeat(32);
    assert!(
        server
            .stop_pod_sandbox(Request::new(StopPodSandboxRequest {
                pod_sandbox_id: id.clone()
            }))
            .await
            .is_ok()
    );
    assert!(
        server
            .remove_pod_sandbox(Request::new(RemovePodSandboxRequest {
                pod_sandbox_id: id.clone()
            }))
            .await
            .is_ok()
    );
    assert!(
        server
            .stop_container(Request::new(StopContainerRequest {
                container_id: id.clone(),
                timeout: -1
            }))
            .await
            .is_ok()
    );
    assert!(
        server
            .remove_container(Request::new(RemoveContainerRequest {
                container_id: id.clone()
            }))
            .await
            .is_ok()
    );
    let image = Some(ImageSpec {
        image: "registry.test/none:1".into(),
        ..Default::default()
    });
    assert!(
        server
            .remove_image(Request::new(RemoveImageRequest {
                image: image.clone()
            }))
            .await
            .is_ok()
    );
    let status = server
        .image_status(Request::new(ImageStatusRequest {
            image,
            verbose: true,
        }))
        .await
        .unwrap();
    assert_eq!(status.into_inner().image, None);
    for code in [
        code(
            server
                .pod_sandbox_status(Request::new(PodSandboxStatusRequest {
                    pod_sandbox_id: id.clone(),
                    verbose: true,
                }))
                .await,
        ),
        code(
            server
                .container_status(Request::new(ContainerStatusRequest {
                    container_id: id.clone(),
                    verbose: true,
                }))
                .await,
        ),
        code(
            server
                .start_container(Request::new(StartContainerRequest {
                    container_id: id.clone(),
                }))
                .await,
        ),
        code(
            server
                .exec_sync(Request::new(ExecSyncRequest {
                    container_id: id,
                    cmd: vec!["x".into()],
                    timeout: 1,
                }))
                .await,
        ),
    ] {
        assert_eq!(code, Code::NotFound);
    }
}

fn run_request(handler: &str) -> RunPodSandboxRequest {
    RunPodSandboxRequest {
        config: Some(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "web".into(),
                namespace: "ns".into(),
                uid: "u".into(),
                attempt: 0,
            }),
            ..Default::default()
        }),
        runtime_handler: handler.into(),
    }
}

#[tokio::test]
async fn run_pod_with_unknown_handler_names_it() {
    let server = Fixture::new().await.server;
    let error = server
        .run_pod_sandbox(Request::new(run_request("gvisor")))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(
        error.message().contains("\"gvisor\""),
        "{}",
        error.message()
    );
}

#[tokio::test]
async fn run_pod_without_network_config_fails_and_status_explains() {
    let fixture = Fixture::new().await;
    let server = &fixture.server;
    std::fs::create_dir(fixture.dir.path().join("net.d")).unwrap();
    let error = server
        .run_pod_sandbox(Request::new(run_request("boxlite")))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(
        error.message().contains("no network configuration"),
        "{}",
        error.message()
    );
    assert!(server.runtime.boxes().is_empty(), "the pod remains");
    let status = server
        .status(Request::new(StatusRequest { verbose: true }))
        .await
        .unwrap()
        .into_inner();
    let conditions = status.status.unwrap().conditions;
    let network = conditions
        .iter()
        .find(|condition| condition.r#type == "NetworkReady")
        .unwrap();
    assert!(!network.status);
    assert_eq!(network.reason, "NetworkPluginNotReady");
    assert!(network.message.contains("net.d"), "{}", network.message);
    assert!(
        conditions
            .iter()
            .any(|condition| condition.r#type == "RuntimeReady" && condition.status)
    );
    let handlers: Vec<_> = status
        .runtime_handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    assert_eq!(handlers, ["", "boxlite"]);
    assert!(status.info["config"].contains("net.d"));
}

#[tokio::test]
async fn run_pod_with_impossible_vm_size_allocates_no_address() {
    // The largest value that counts as a limit: an exbibyte or more means no limit.
    let fixture = Fixture::new().await;
    let mut request = run_request("");
    request.config.as_mut().unwrap().linux = Some(LinuxPodSandboxConfig {
        resources: Some(LinuxContainerResources {
            memory_limit_in_bytes: (1 << 60) - 1,
            ..Default::default()
        }),
        ..Default::default()
    });
    let error = fixture
        .server
        .run_pod_sandbox(Request::new(request))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(
        !fixture.dir.path().join("root/cni").exists(),
        "CNI was asked"
    );
}

#[tokio::test]
async fn update_runtime_config_validates_and_stores_pod_cidrs() {
    let server = Fixture::new().await.server;
    let update = |cidr: &str| {
        Request::new(UpdateRuntimeConfigRequest {
            runtime_config: Some(RuntimeConfig {
                network_config: Some(NetworkConfig {
                    pod_cidr: cidr.into(),
                }),
            }),
        })
    };
    assert!(
        server
            .update_runtime_config(update("10.1.0.0/24, fd00::/64"))
            .await
            .is_ok()
    );
    assert_eq!(*server.pod_cidrs.lock(), ["10.1.0.0/24", "fd00::/64"]);
    assert_eq!(
        code(server.update_runtime_config(update("10.1.0.0")).await),
        Code::InvalidArgument
    );
    assert!(server.update_runtime_config(update("")).await.is_ok());
    assert_eq!(server.pod_cidrs.lock().len(), 2);
}

#[test]
fn runtime_error_kinds_map_to_grpc_codes() {
    let error = RuntimeError::NotFound {
        subject: "box",
        id: "x".into(),
    };
    assert_eq!(convert_status::status(&error).code(), Code::NotFound);
    let error = RuntimeError::Deadline {
        detail: "guest".into(),
        limit: std::time::Duration::from_secs(1),
    };
    assert_eq!(
        convert_status::status(&error).code(),
        Code::DeadlineExceeded
    );
}

#[test]
fn new_id_returns_distinct_64_digit_hex() {
    let (a, b) = (new_id(), new_id());
    assert_eq!(a.len(), 64);
    assert!(a.chars().all(|c| c.is_ascii_hexdigit()));
    assert_ne!(a, b);
}
