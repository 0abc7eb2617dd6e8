//! Tests of plans for specs in the form of containerd 1.6 and 2.x.

use super::*;
use serde_json::json;
use std::path::Path;

fn spec(value: serde_json::Value) -> Spec {
    serde_json::from_value(value).expect("a spec")
}

fn config() -> ShimConfig {
    let text = "vmm = 'qemu'\nacceleration = 'tcg'\nallowed_annotations = ['io.boxlite.vcpus']";
    ShimConfig::parse(text, Path::new("/x")).expect("valid")
}

#[tokio::test]
async fn pause_container_has_the_pods_limits_in_annotations() {
    let spec = spec(json!({
        "ociVersion": "1.0.2", "hostname": "web",
        "annotations": {
            SANDBOX_NAME: "web-0", SANDBOX_NAMESPACE: "shop", SANDBOX_UID: "u1",
            CONTAINER_TYPE: "sandbox", SANDBOX_MEMORY: "134217728", SANDBOX_QUOTA: "150000", SANDBOX_PERIOD: "100000",
        },
        "linux": {
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
            "cgroupsPath": "/no-such-kubepods/pod1/abc",
            "resources": {"cpu": {"shares": 2}},
            "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "ipc"}],
        },
    }));
    assert!(is_pause(&spec));
    assert_eq!(network(&spec), Network::Namespace("/run/netns/x".into()));
    let plan = of_task("abc", &spec, Some("/run/netns/x".into()), &config())
        .await
        .expect("a plan");
    let options = plan.options;
    assert_eq!((options.vcpus, options.memory_mib), (2, 128 + 100));
    let names = options.pod.expect("names");
    assert_eq!(
        (
            names.namespace.as_str(),
            names.name.as_str(),
            names.uid.as_str()
        ),
        ("shop", "web-0", "u1")
    );
    assert_eq!(options.hostname, "web");
    assert_eq!(options.cgroup_parent, "/no-such-kubepods/pod1");
    assert_eq!(options.sysctls.len(), 1);
    assert!(plan.local_ports && !plan.host_ipc && !options.host_network);
    assert_eq!(plan.owner, SandboxOwner::Task);
}

#[tokio::test]
async fn task_of_ctr_has_its_own_limits_and_a_private_network() {
    let spec = spec(json!({
        "ociVersion": "1.0.2", "annotations": {"io.boxlite.vcpus": "3"},
        "linux": {
            "cgroupsPath": "/x",
            "resources": {"memory": {"limit": 67_108_865}, "cpu": {"quota": 50000, "period": 100000}},
            "namespaces": [{"type": "network"}],
        },
    }));
    assert_eq!(network(&spec), Network::Private);
    let plan = of_task("0123456789abcdef", &spec, None, &config())
        .await
        .expect("a plan");
    let options = plan.options;
    assert_eq!((options.vcpus, options.memory_mib), (3, 65 + 98));
    assert_eq!(options.hostname, "0123456789ab");
    assert_eq!(options.cgroup_parent, "", "the root cgroup is not a pod's");
}

#[tokio::test]
async fn spec_without_network_namespace_uses_the_hosts() {
    let spec = spec(json!({"ociVersion": "1.0.2", "linux": {"namespaces": [{"type": "mount"}]}}));
    assert_eq!(network(&spec), Network::Host);
    let plan = of_task("abc", &spec, None, &config())
        .await
        .expect("a plan");
    assert!(plan.options.host_network && !plan.local_ports);
    assert!(plan.host_ipc, "the spec has no IPC namespace either");
}

#[tokio::test]
async fn pod_config_sets_size_cgroup_and_network() {
    let mut pod = PodConfig::new();
    pod.hostname = "web".to_owned();
    pod.metadata.mut_or_insert_default().name = "web-1".to_owned();
    let linux = pod.linux.mut_or_insert_default();
    linux.cgroup_parent = "kubepods-podX.slice".to_owned();
    linux
        .resources
        .mut_or_insert_default()
        .memory_limit_in_bytes = 100 << 20;
    linux.overhead.mut_or_insert_default().memory_limit_in_bytes = 160 << 20;
    let netns = Some(PathBuf::from("/run/netns/x"));
    let plan = of_pod("abc", &pod, netns.clone(), &config())
        .await
        .expect("a plan");
    assert!(!plan.options.host_network && plan.local_ports);
    assert_eq!(plan.options.memory_mib, 199, "the overhead is the host's");
    assert_eq!(plan.options.containers_bytes, 100 << 20);
    assert_eq!(
        plan.options.cgroup_parent,
        "/kubepods.slice/kubepods-podX.slice"
    );
    assert_eq!(plan.owner, SandboxOwner::Sandboxer);

    let linux = pod.linux.mut_or_insert_default();
    let security = linux.security_context.mut_or_insert_default();
    security.namespace_options.mut_or_insert_default().network = NODE;
    let error = of_pod("abc", &pod, netns, &config())
        .await
        .expect_err("both");
    assert!(error.to_string().contains("netns_path"), "{error}");
    let plan = of_pod("abc", &pod, None, &config()).await.expect("a plan");
    assert!(plan.options.host_network && !plan.local_ports);
}

#[tokio::test]
async fn limit_of_an_exbibyte_is_no_limit() {
    let mut pod = PodConfig::new();
    let resources = pod.linux.mut_or_insert_default();
    let resources = resources.resources.mut_or_insert_default();
    resources.memory_limit_in_bytes = 1 << 60;
    let plan = of_pod("abc", &pod, None, &config()).await.expect("a plan");
    let defaults = config().pod;
    assert_eq!(plan.options.memory_mib, defaults.memory_mib + 160);
}

#[tokio::test]
async fn passt_serves_private_networks_if_configured() {
    let text = "vmm = 'qemu'\nacceleration = 'tcg'\n[network]\nwithout_cni = 'passt'";
    let passt = ShimConfig::parse(text, Path::new("/x")).expect("valid");
    let with = |namespaces: serde_json::Value| {
        spec(json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}}))
    };
    let private = with(json!([{"type": "network"}]));
    assert!(has_passt(&private, &passt) && !has_passt(&private, &config()));
    let plan = of_task("abc", &private, None, &passt)
        .await
        .expect("a plan");
    assert!(plan.options.passt && !plan.options.host_network);
    let host = of_task("abc", &with(json!([])), None, &passt).await;
    let host = host.expect("a plan").options;
    assert!(host.host_network && !host.passt);
    let named = with(json!([{"type": "network", "path": "/run/netns/x"}]));
    assert!(!has_passt(&named, &passt));

    let pod = PodConfig::new();
    let plan = of_pod("abc", &pod, None, &passt).await.expect("a plan");
    assert!(plan.options.passt && !plan.options.host_network);
    let netns = Some("/run/netns/x".into());
    let plan = of_pod("abc", &pod, netns, &passt).await.expect("a plan");
    assert!(!plan.options.passt);
}
