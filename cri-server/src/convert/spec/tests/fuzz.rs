//! Fuzz tests of the conversion: CRI messages damaged on the wire, and seccomp profiles.

use super::*;
use boxlite_fuzz::Fuzz;
use boxlite_proto::cri::v1::security_profile::ProfileType;
use prost::Message;

const WORDS: [&str; 8] = ["/", "..", "=", "\0", "ALL", "CAP_", "65536", "-1"];

/// A container with a value in many fields.
fn full_container() -> ContainerConfig {
    let mut config = container();
    config.envs.push(KeyValue {
        key: "A".into(),
        value: "b".into(),
    });
    config.mounts.push(Mount {
        container_path: "/data".into(),
        host_path: "/etc".into(),
        ..Default::default()
    });
    config.devices.push(Device {
        container_path: "/dev/fuse".into(),
        host_path: "/dev/fuse".into(),
        permissions: "rwm".into(),
    });
    let security = security(&mut config);
    security.capabilities = Some(Capability {
        add_capabilities: vec!["NET_ADMIN".into()],
        ..Default::default()
    });
    security.run_as_user = Some(Int64Value { value: 1 });
    security.supplemental_groups = vec![1, 2];
    if let Some(linux) = &mut config.linux {
        linux.resources = Some(LinuxContainerResources {
            cpu_quota: 1000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 1 << 28,
            ..Default::default()
        });
    }
    config
}

#[test]
fn fuzz_container_is_converted_or_refused() {
    let seed = full_container().encode_to_vec();
    Fuzz::new("container")
        .seed(seed)
        .words(&WORDS)
        .run(|input| {
            if let Ok(config) = ContainerConfig::decode(input) {
                drop(made(&config, json!({"Env": ["A=b"], "User": "1:2"})));
            }
        });
}

#[test]
fn fuzz_pod_is_converted_or_refused() {
    let seed = pod().config.expect("a config").encode_to_vec();
    Fuzz::new("pod").seed(seed).words(&WORDS).run(|input| {
        let Ok(config) = PodSandboxConfig::decode(input) else {
            return;
        };
        let Ok(sandbox) = PodMetadata::new(config, String::new()) else {
            return;
        };
        drop(sandbox.network("ab", &[]));
        drop((sandbox.hostname(), sandbox.hosts(), sandbox.resolv_conf()));
        drop(made_in(&sandbox, &container(), json!({})));
    });
}

#[test]
fn fuzz_seccomp_profile_is_read_or_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("profile.json");
    let words = [
        "\"args\":",
        "\"names\":",
        "SCMP_ACT_ERRNO",
        "null",
        "-1",
        "[",
        "{",
    ];
    Fuzz::new("seccomp").words(&words).run(|input| {
        std::fs::write(&path, input).expect("written");
        let mut config = container();
        security(&mut config).seccomp = Some(SecurityProfile {
            profile_type: ProfileType::Localhost as i32,
            localhost_ref: path.display().to_string(),
        });
        drop(made(&config, json!({})));
    });
}
