//! Tests of a pod's conversion.

use super::*;
use crate::config::Config;
use boxlite_proto::cri::v1::{
    DnsConfig, IdMapping, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PortMapping,
};
use proptest::prelude::*;

fn config() -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "web".into(),
            uid: "u-1".into(),
            namespace: "default".into(),
            attempt: 2,
        }),
        hostname: "web-0".into(),
        ..Default::default()
    }
}

fn record(config: PodSandboxConfig) -> PodMetadata {
    PodMetadata::new(config, "boxlite".into()).unwrap()
}

#[test]
fn missing_required_fields_are_named() {
    let refused = |config| {
        PodMetadata::new(config, String::new())
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        refused(PodSandboxConfig::default()),
        "config.metadata is missing"
    );
    let mut nameless = config();
    nameless.metadata = Some(PodSandboxMetadata::default());
    assert_eq!(refused(nameless), "config.metadata.name is missing");
    let mut wrong = config();
    wrong.hostname = "a/b".into();
    assert!(refused(wrong).contains("not a hostname"));
    let mut relative = config();
    relative.log_directory = "logs".into();
    assert!(refused(relative).contains("log_directory"));
}

#[test]
fn namespaces_of_the_node() {
    let with = |options: NamespaceOption| {
        let mut pod = config();
        pod.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        });
        PodMetadata::new(pod, String::new())
    };
    let node = NamespaceMode::Node as i32;
    let both = NamespaceOption {
        pid: node,
        ipc: node,
        ..Default::default()
    };
    assert!(with(both.clone()).is_ok());
    let mapping = vec![IdMapping {
        host_id: 1000,
        container_id: 0,
        length: 10,
    }];
    let userns = UserNamespace {
        mode: NamespaceMode::Pod as i32,
        uids: mapping.clone(),
        gids: mapping,
    };
    let mapped = with(NamespaceOption {
        userns_options: Some(userns.clone()),
        ..Default::default()
    });
    assert_eq!(mapped.unwrap().userns(), Some(&userns));
    let text = with(NamespaceOption {
        userns_options: Some(userns),
        ..both
    })
    .unwrap_err()
    .to_string();
    assert!(text.contains("userns_options"), "{text}");
}

#[test]
fn host_network_pod_has_no_netns() {
    let made = |network| {
        let mut pod = config();
        pod.linux = Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    network,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let record = PodMetadata::new(pod, String::new()).unwrap();
        record
            .box_options("ab", None, &Config::default().pod)
            .unwrap()
            .host_network
    };
    assert!(made(NamespaceMode::Node as i32));
    assert!(!made(NamespaceMode::Pod as i32));
}

#[test]
fn box_options_have_name_size_and_metadata() {
    let mut pod = config();
    pod.linux = Some(LinuxPodSandboxConfig {
        cgroup_parent: "/kubepods/podu-1".into(),
        sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
        ..Default::default()
    });
    let record = record(pod);
    let options = record
        .box_options("ab", Some("/run/x".into()), &Config::default().pod)
        .unwrap();
    assert_eq!(options.name, "default/web/u-1/2");
    assert_eq!(
        (options.vcpus, options.memory_mib, options.scratch_bytes),
        (1, 2208, 10 << 30)
    );
    assert_eq!(options.hostname, "web-0");
    assert_eq!(options.cgroup_parent, "/kubepods/podu-1");
    assert_eq!(options.sysctls["net.ipv4.ip_forward"], "1");
    assert_eq!(PodMetadata::from_bytes(&options.metadata), record);
}

#[test]
fn hostname_defaults_to_pod_name() {
    let mut pod = config();
    pod.hostname.clear();
    pod.metadata.as_mut().unwrap().name = format!("a.b{}", "c".repeat(80));
    let hostname = record(pod).hostname();
    assert_eq!(hostname.len(), 63);
    assert!(hostname.starts_with("a-bc"));
}

#[test]
fn network_has_ports_bandwidth_and_dns() {
    let mut pod = config();
    pod.port_mappings = vec![
        PortMapping {
            protocol: 1,
            container_port: 53,
            host_port: 5353,
            host_ip: "127.0.0.1".into(),
        },
        PortMapping {
            protocol: 0,
            container_port: 80,
            host_port: 0,
            ..Default::default()
        },
    ];
    pod.annotations
        .insert("kubernetes.io/ingress-bandwidth".into(), "10M".into());
    pod.dns_config = Some(DnsConfig {
        servers: vec!["10.0.0.10".into()],
        searches: vec!["svc".into(), "local".into()],
        options: vec!["ndots:5".into()],
    });
    let record = record(pod);
    let network = record.network("ab", &["10.1.0.0/24".into()]).unwrap();
    assert_eq!(
        serde_json::to_value(&network.port_mappings).unwrap(),
        serde_json::json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": "127.0.0.1"}])
    );
    let bandwidth = network.bandwidth.unwrap();
    assert_eq!(
        (bandwidth.ingress_rate, bandwidth.egress_rate),
        (10_000_000, 0)
    );
    assert_eq!(network.dns.servers, ["10.0.0.10"]);
    assert_eq!(
        record.resolv_conf().unwrap(),
        "search svc local\nnameserver 10.0.0.10\noptions ndots:5\n"
    );
}

#[test]
fn invalid_ports_and_rates_are_rejected() {
    let mut pod = config();
    pod.port_mappings = vec![PortMapping {
        container_port: 70_000,
        ..Default::default()
    }];
    assert!(PodMetadata::new(pod, String::new()).is_err());
    for rate in ["", "10X", "-1", "999", "2000000T", "99999999999999999999"] {
        assert!(quantity("x", rate).is_err(), "{rate}");
    }
    assert_eq!(quantity("x", "1Mi"), Ok(1 << 20));
}

#[test]
fn hosts_names_the_pod() {
    let mut record = record(config());
    record.set_addresses(&["10.1.0.5".parse().unwrap()]);
    assert!(record.hosts().ends_with("10.1.0.5\tweb-0\n"));
}

proptest! {
    #[test]
    fn different_pods_have_different_keys(a in ("\\PC{0,8}", "\\PC{0,8}", "\\PC{0,8}", 0_u32..3), b in ("\\PC{0,8}", "\\PC{0,8}", "\\PC{0,8}", 0_u32..3)) {
        let of = |(name, namespace, uid, attempt): &(String, String, String, u32)| PodSandboxMetadata {
            name: name.clone(), namespace: namespace.clone(), uid: uid.clone(), attempt: *attempt,
        };
        prop_assert_eq!(a == b, key(&of(&a)) == key(&of(&b)));
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = PodMetadata::from_bytes(&bytes).hostname();
    }
}

#[test]
fn host_network_pod_without_hostname_has_the_nodes() {
    let mut record = record(config());
    let config = record.config.as_mut().unwrap();
    config.hostname.clear();
    let node = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let security = config
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default();
    security.namespace_options.get_or_insert_default().network = NamespaceMode::Node as i32;
    assert_eq!(record.hostname(), node);
    record.config.as_mut().unwrap().hostname = "given".into();
    assert_eq!(record.hostname(), "given");
}
