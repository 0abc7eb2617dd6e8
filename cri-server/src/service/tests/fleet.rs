//! A server whose pods are fake shims (`boxlite_runtime::fake_shim`) and whose CNI plugin is a script: everything but
//! the VM. Tests with pods run in separate network and mount namespaces.

use super::*;
use boxlite_proto::cri::v1::ContainerMetadata;
use boxlite_runtime::fake_shim::FakeNode;
use std::os::unix::fs::PermissionsExt;
use tokio_util::task::AbortOnDropHandle;

/// The image of a fake node.
pub(crate) const IMAGE: &str = "docker.io/library/x:latest";

/// Runs a test of `service` in [`crate::inner_run::inside`].
pub(crate) fn inside(test: &str) -> bool {
    crate::inner_run::inside(&format!("service::tests::{test}"))
}

/// Runs a test in a multi-threaded tokio runtime like the daemon's.
pub(crate) fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

/// A server and its node.
pub(crate) struct Fleet {
    pub server: Server,
    pub node: Arc<FakeNode>,
    _attending: AbortOnDropHandle<()>,
}

impl Fleet {
    pub(crate) async fn new() -> Self {
        let node = Arc::new(FakeNode::new());
        let attended = node.clone();
        let attending =
            AbortOnDropHandle::new(tokio::spawn(async move { attended.attend().await }));
        Self {
            server: server(&node).await,
            node,
            _attending: attending,
        }
    }

    /// Asserts that nothing remains after everything was removed.
    pub(crate) fn assert_nothing_left(&self) {
        assert!(self.server.runtime.boxes().is_empty(), "a pod remains");
        assert_no_leaks(&self.node);
    }
}

/// Asserts that a node without pods has no shims, files, addresses and mounts of pods.
pub(crate) fn assert_no_leaks(node: &FakeNode) {
    assert_eq!(node.alive(), 0, "a shim remains");
    let places = [
        "s/s",
        "s/netns",
        "s/pods",
        "s/records",
        "r/cni",
        "r/scratch",
        "leases",
    ];
    for place in places {
        let left: Vec<_> = std::fs::read_dir(node.at(place))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        assert!(left.is_empty(), "{place}: {left:?}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let own = node.at("");
    let left = mounts
        .lines()
        .find(|line| line.contains(own.to_str().unwrap()));
    assert_eq!(left, None, "a mount remains");
}

/// Starts a daemon over the node's directories.
pub(crate) async fn server(node: &FakeNode) -> Server {
    let options = node.options();
    let mut config = Config {
        root: options.root.clone(),
        state: options.state.clone(),
        ..Config::default()
    };
    config.timeouts.stats = std::time::Duration::from_millis(700);
    config.cni.conf_dir = node.at("net.d");
    config.cni.bin_dirs = vec![node.at("bin")];
    for place in ["net.d", "bin", "leases"] {
        std::fs::create_dir_all(node.at(place)).unwrap();
    }
    let conflist = r#"{"cniVersion":"1.0.0","name":"fake","plugins":[{"type":"fake"}]}"#;
    std::fs::write(node.at("net.d").join("10-fake.conflist"), conflist).unwrap();
    // Each address is a file.
    let plugin = "#!/bin/sh\nlease=BASE/leases/$CNI_CONTAINERID\ncase $CNI_COMMAND in\n\
         ADD) : > $lease; echo '{\"cniVersion\":\"1.0.0\",\"ips\":[{\"address\":\"10.1.2.3/24\"}]}' ;;\nDEL) rm -f $lease ;;\nesac\n";
    let plugin = plugin.replace("BASE", node.at("").to_str().unwrap());
    std::fs::write(node.at("bin").join("fake"), plugin).unwrap();
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(node.at("bin").join("fake"), mode).unwrap();
    let runtime = BoxliteRuntime::open(options).await.unwrap();
    let streaming = Streaming::new(config.streaming, ([127, 0, 0, 1], 1).into());
    Server::new(
        runtime,
        config,
        Arc::new(Metrics::new().unwrap()),
        "fake".into(),
        streaming,
    )
}

/// Returns a RunPodSandbox request for a pod of this name.
pub(crate) fn run_pod(name: &str) -> RunPodSandboxRequest {
    let mut request = run_request("");
    let config = request.config.as_mut().unwrap();
    config.metadata.as_mut().unwrap().name = name.into();
    config.labels = [("app".to_owned(), name.to_owned())].into();
    request
}

/// Returns a CreateContainer request for a container of this name.
pub(crate) fn create(pod: &str, name: &str) -> CreateContainerRequest {
    CreateContainerRequest {
        pod_sandbox_id: pod.into(),
        config: Some(ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: IMAGE.into(),
                ..Default::default()
            }),
            command: vec!["/bin/true".into()],
            envs: vec![KeyValue {
                key: "RAW".into(),
                value: vec![0xff, 0x66, 0xfe].into(),
            }],
            ..Default::default()
        }),
        sandbox_config: None,
    }
}

/// Starts a pod with a running container and returns both ids.
pub(crate) async fn running(server: &Server, name: &str) -> (String, String) {
    let pod = server
        .run_pod_sandbox(Request::new(run_pod(name)))
        .await
        .unwrap()
        .into_inner()
        .pod_sandbox_id;
    let container_id = server
        .create_container(Request::new(create(&pod, "c")))
        .await
        .unwrap()
        .into_inner()
        .container_id;
    let start = StartContainerRequest {
        container_id: container_id.clone(),
    };
    server.start_container(Request::new(start)).await.unwrap();
    (pod, container_id)
}

/// Removes a pod.
pub(crate) async fn remove(server: &Server, pod: &str) {
    let request = RemovePodSandboxRequest {
        pod_sandbox_id: pod.into(),
    };
    server
        .remove_pod_sandbox(Request::new(request))
        .await
        .unwrap();
}
