//! Tests of the spec, field by field, against the spec of containerd's CRI plugin.

mod fuzz;
mod kubelet;

use super::process::DEFAULT_PATH;
use super::*;
use boxlite_proto::cri::v1::{
    Capability, CdiDevice, ContainerMetadata, Device, IdMapping, ImageSpec, Int64Value, KeyValue,
    LinuxContainerConfig, LinuxContainerResources, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    SecurityProfile, UserNamespace,
};
use proptest::prelude::*;

fn image(config: Value) -> ImageConfiguration {
    serde_json::from_value(json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": []}, "history": [],
    }))
    .unwrap()
}

fn pod() -> PodMetadata {
    let config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: "web".into(),
            uid: "u".into(),
            namespace: "ns".into(),
            attempt: 0,
        }),
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                privileged: true,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    PodMetadata::new(config, String::new()).unwrap()
}

fn container() -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: "app".into(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: "busybox".into(),
            ..Default::default()
        }),
        command: vec!["/bin/true".into()],
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: 1,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn security(container: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    container
        .linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap()
}

fn made(config: &ContainerConfig, image_config: Value) -> Result<Value, ConvertError> {
    made_in(&pod(), config, image_config)
}

fn made_in(
    sandbox: &PodMetadata,
    config: &ContainerConfig,
    image_config: Value,
) -> Result<Value, ConvertError> {
    let image = image(image_config);
    spec(Source {
        config,
        sandbox,
        sandbox_id: "ab",
        image: &image,
        files: Path::new("/files"),
    })
    .map(|spec| serde_json::to_value(spec).unwrap())
}

#[test]
fn default_container_has_default_spec() {
    let spec = made(&container(), json!({})).unwrap();
    assert_eq!(spec["process"]["args"], json!(["/bin/true"]));
    assert_eq!(spec["process"]["cwd"], "/");
    assert_eq!(
        spec["process"]["env"],
        json!([
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOSTNAME=web"
        ])
    );
    assert_eq!(spec["process"]["noNewPrivileges"], false);
    assert_eq!(spec["root"]["readonly"], false);
    assert_eq!(
        spec["linux"]["namespaces"],
        json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "pid"}])
    );
    assert_eq!(spec["linux"]["maskedPaths"], json!([]));
    assert_eq!(spec["linux"]["readonlyPaths"], json!([]));
    assert_eq!(spec["linux"]["seccomp"], Value::Null);
    assert_eq!(
        spec["annotations"]["io.kubernetes.cri.container-name"],
        "app"
    );
    assert_eq!(spec["annotations"]["io.kubernetes.cri.sandbox-id"], "ab");
    let targets: Vec<_> = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["destination"].as_str().unwrap())
        .collect();
    assert_eq!(
        targets,
        [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
            "/dev/shm",
            "/etc/hostname",
            "/etc/hosts",
            "/etc/resolv.conf"
        ]
    );
    let mut bounding = spec["process"]["capabilities"]["bounding"]
        .as_array()
        .unwrap()
        .clone();
    bounding.sort_by_key(ToString::to_string);
    assert_eq!(bounding.len(), 14);
    assert_eq!(bounding[0], "CAP_AUDIT_WRITE");
}

#[test]
fn command_and_args_against_entrypoint_and_cmd() {
    let image = json!({"Entrypoint": ["/e"], "Cmd": ["c"]});
    for (command, args, expected) in [
        (vec![], vec![], json!(["/e", "c"])),
        (vec!["/x"], vec![], json!(["/x"])),
        (vec![], vec!["a"], json!(["/e", "a"])),
        (vec!["/x"], vec!["a"], json!(["/x", "a"])),
    ] {
        let mut config = container();
        config.command = command.into_iter().map(str::to_owned).collect();
        config.args = args.into_iter().map(str::to_owned).collect();
        assert_eq!(
            made(&config, image.clone()).unwrap()["process"]["args"],
            expected
        );
    }
    let mut nothing = container();
    nothing.command.clear();
    // `ENTRYPOINT [""]` in an image counts as none, as in containerd.
    let reset = json!({"Entrypoint": [""], "Cmd": ["c"]});
    assert_eq!(
        made(&nothing, reset).unwrap()["process"]["args"],
        json!(["c"])
    );
    assert!(matches!(
        made(&nothing, json!({})),
        Err(ConvertError::Missing(_))
    ));
}

#[test]
fn environment_is_overridden_in_place() {
    let mut config = container();
    config.tty = true;
    config.envs = vec![
        KeyValue {
            key: "A".into(),
            value: "request".into(),
        },
        KeyValue {
            key: "BYTES".into(),
            value: vec![b'x', 0xff].into(),
        },
        KeyValue {
            key: "A".into(),
            value: "last".into(),
        },
    ];
    let spec = made(&config, json!({"Env": ["PATH=/bin", "A=image", "B=image"]})).unwrap();
    assert_eq!(
        spec["process"]["env"],
        json!([
            "PATH=/bin",
            "HOSTNAME=web",
            "TERM=xterm",
            "A=last",
            "B=image",
            "BYTES=x\u{fffd}"
        ])
    );
    config.envs = vec![KeyValue {
        key: "A=B".into(),
        value: "x".into(),
    }];
    assert!(made(&config, json!({})).is_err());
}

/// containerd's treatment of the entries that image builders write by mistake.
#[test]
fn environment_entry_without_value_unsets() {
    let mut config = container();
    config.envs.clear();
    let env =
        |image: Value| made(&config, json!({"Env": image})).unwrap()["process"]["env"].clone();
    let path = format!("PATH={DEFAULT_PATH}");
    assert_eq!(
        env(json!(["A=1", "A", "NONE", "", "=odd", "B=", "C=x=y"])),
        json!([path, "HOSTNAME=web", "=odd", "B=", "C=x=y"])
    );
    assert_eq!(env(json!(["PATH"])), json!(["HOSTNAME=web"]));
}

#[test]
fn user_comes_from_the_request_or_the_image() {
    let uid = |value| Some(Int64Value { value });
    let of = |set: &dyn Fn(&mut LinuxContainerSecurityContext), image: &str| {
        let mut config = container();
        set(security(&mut config));
        made(&config, json!({"User": image})).map(|spec| spec["process"]["user"].clone())
    };
    let nothing = |_: &mut LinuxContainerSecurityContext| {};
    // Numeric users have no name; the guest resolves everything else.
    assert_eq!(
        of(&nothing, "1003:1004").unwrap(),
        json!({"uid": 1003, "gid": 1004})
    );
    assert_eq!(
        of(&nothing, "").unwrap(),
        json!({"uid": 0, "gid": 0, "username": "0"})
    );
    assert_eq!(
        of(&nothing, "1002").unwrap(),
        json!({"uid": 1002, "gid": 0, "username": "1002"})
    );
    assert_eq!(of(&nothing, "www-data").unwrap()["username"], "www-data");
    assert_eq!(
        of(&nothing, "www-data:1004").unwrap()["username"],
        "www-data:1004"
    );
    assert_eq!(of(&nothing, "www-data:1004").unwrap()["gid"], 1004);
    assert_eq!(
        of(&|s| s.run_as_user = uid(5), "7:8").unwrap(),
        json!({"uid": 5, "gid": 0, "username": "5"})
    );
    let both = |s: &mut LinuxContainerSecurityContext| {
        s.run_as_user = uid(5);
        s.run_as_group = uid(6);
        s.supplemental_groups = vec![9];
    };
    assert_eq!(
        of(&both, "7:8").unwrap(),
        json!({"uid": 5, "gid": 6, "additionalGids": [9]})
    );
    assert_eq!(
        of(&|s| s.run_as_username = "app".into(), "7").unwrap()["username"],
        "app"
    );
    assert!(of(&|s| s.run_as_group = uid(6), "").is_err());
    assert!(of(&|s| s.run_as_user = uid(-1), "").is_err());
    assert!(of(&|s| s.run_as_user = uid(4_294_967_295), "").is_err());
    assert!(of(&|s| s.run_as_username = "a\nb".into(), "").is_err());
    assert!(of(&nothing, "99999999999").is_err());
}

#[test]
fn groups_of_the_image_are_merged_unless_strict() {
    let mut config = container();
    assert_eq!(
        made(&config, json!({})).unwrap()["annotations"]["boxlite.groups"],
        "merge"
    );
    security(&mut config).supplemental_groups_policy = 1;
    assert_eq!(
        made(&config, json!({})).unwrap()["annotations"].get("boxlite.groups"),
        None
    );
}

fn capabilities_of(capabilities: Capability) -> Result<Vec<String>, ConvertError> {
    let mut config = container();
    security(&mut config).capabilities = Some(capabilities);
    let spec = made(&config, json!({}))?;
    let mut names: Vec<String> =
        serde_json::from_value(spec["process"]["capabilities"]["effective"].clone()).unwrap();
    names.sort();
    Ok(names)
}

#[test]
fn capabilities_are_added_and_dropped() {
    let changes = |add: &[&str], drop: &[&str]| Capability {
        add_capabilities: add.iter().map(|&c| c.to_owned()).collect(),
        drop_capabilities: drop.iter().map(|&c| c.to_owned()).collect(),
        ..Default::default()
    };
    assert_eq!(
        capabilities_of(changes(&["NET_BIND_SERVICE"], &["ALL"])).unwrap(),
        ["CAP_NET_BIND_SERVICE"]
    );
    assert_eq!(capabilities_of(changes(&["ALL"], &[])).unwrap().len(), 41);
    assert_eq!(
        capabilities_of(changes(&["ALL"], &["chown"]))
            .unwrap()
            .len(),
        40
    );
    assert_eq!(
        capabilities_of(changes(&["cap_sys_admin"], &["CAP_KILL"]))
            .unwrap()
            .len(),
        14
    );
    assert!(
        capabilities_of(changes(&["FLY"], &[]))
            .unwrap_err()
            .to_string()
            .contains("FLY")
    );
}

#[test]
fn ambient_capabilities_are_in_every_set() {
    let mut config = container();
    security(&mut config).capabilities = Some(Capability {
        add_ambient_capabilities: vec!["NET_RAW".into()],
        drop_capabilities: vec!["ALL".into()],
        ..Default::default()
    });
    let spec = made(&config, json!({})).unwrap();
    for set in [
        "bounding",
        "effective",
        "permitted",
        "inheritable",
        "ambient",
    ] {
        assert_eq!(
            spec["process"]["capabilities"][set],
            json!(["CAP_NET_RAW"]),
            "{set}"
        );
    }
}

#[test]
fn privileged_container_has_all_privileges() {
    let mut config = container();
    security(&mut config).privileged = true;
    let spec = made(&config, json!({})).unwrap();
    assert_eq!(
        spec["process"]["capabilities"]["bounding"]
            .as_array()
            .unwrap()
            .len(),
        41
    );
    assert_eq!(spec["linux"]["maskedPaths"], json!([]));
    assert_eq!(spec["linux"]["readonlyPaths"], json!([]));
    assert_eq!(spec["annotations"]["boxlite.privileged"], "true");
    let sys = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .find(|m| m["destination"] == "/sys")
        .unwrap();
    assert_eq!(sys["options"], json!(["nosuid", "noexec", "nodev", "rw"]));
}

#[test]
fn mounts_nest_cover_and_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().canonicalize().unwrap();
    std::fs::write(real.join("hosts"), "x").unwrap();
    std::os::unix::fs::symlink(real.join("hosts"), real.join("link")).unwrap();
    let mount = |container_path: &str, host: &str, readonly| Mount {
        container_path: container_path.into(),
        host_path: real.join(host).to_string_lossy().into_owned(),
        readonly,
        ..Default::default()
    };
    let mut config = container();
    config.mounts = vec![
        mount("/data/deep", "", true),
        mount("//etc/./hosts", "link", false),
        mount("/data", "", false),
    ];
    let spec = made(&config, json!({})).unwrap();
    let list = spec["mounts"].as_array().unwrap();
    let hosts: Vec<_> = list
        .iter()
        .filter(|m| m["destination"] == "/etc/hosts")
        .collect();
    assert_eq!(
        hosts.len(),
        1,
        "the request's hosts takes the place of the pod's"
    );
    assert_eq!(
        hosts[0]["source"],
        json!(real.join("hosts")),
        "symbolic links are resolved"
    );
    let at = |target| {
        list.iter()
            .position(|m| m["destination"] == target)
            .unwrap()
    };
    assert!(at("/data") < at("/data/deep"));
    assert_eq!(
        list[at("/data/deep")]["options"],
        json!(["rbind", "rprivate", "ro"])
    );
    assert_eq!(
        list[at("/data")]["options"],
        json!(["rbind", "rprivate", "rw"])
    );
}

#[test]
fn volumes_are_converted_to_mounts() {
    let mut config = container();
    let path = |at: &str| Mount {
        container_path: at.into(),
        host_path: "/tmp".into(),
        readonly: true,
        ..Default::default()
    };
    config.mounts = vec![
        Mount {
            recursive_read_only: true,
            ..path("/rro")
        },
        Mount {
            propagation: 1,
            ..path("/slave")
        },
        Mount {
            host_path: String::new(),
            image: Some(ImageSpec {
                image: "x:1".into(),
                image_ref: "sha256:abc".into(),
                ..Default::default()
            }),
            image_sub_path: "etc/x".into(),
            ..path("/image")
        },
    ];
    let spec = made(&config, json!({})).unwrap();
    let list = spec["mounts"].as_array().unwrap();
    let find = |at: &str| {
        list.iter()
            .find(|m| m["destination"] == at)
            .unwrap()
            .clone()
    };
    assert_eq!(find("/rro")["options"], json!(["rbind", "rprivate", "rro"]));
    assert_eq!(find("/slave")["options"], json!(["rbind", "rslave", "ro"]));
    let image = find("/image");
    assert_eq!(
        (&image["type"], &image["source"]),
        (&json!("boxlite.image"), &json!("sha256:abc"))
    );
    assert_eq!(image["options"], json!(["ro", "subpath=etc/x"]));
}

fn refused(mount: Mount) -> String {
    let mut config = container();
    config.mounts = vec![mount];
    made(&config, json!({})).unwrap_err().to_string()
}

#[test]
fn invalid_mounts_are_rejected_by_name() {
    let base = Mount {
        container_path: "/data".into(),
        host_path: "/tmp".into(),
        ..Default::default()
    };
    let missing = refused(Mount {
        host_path: "/proc/nonexistent/xyz".into(),
        ..base.clone()
    });
    assert!(
        missing.contains("/nonexistent/xyz") && missing.contains("/data"),
        "{missing}"
    );
    assert!(
        refused(Mount {
            host_path: "relative".into(),
            ..base.clone()
        })
        .contains("absolute")
    );
    assert!(
        refused(Mount {
            container_path: "/a/../b".into(),
            ..base.clone()
        })
        .contains("..")
    );
    assert!(
        refused(Mount {
            container_path: "/".into(),
            ..base.clone()
        })
        .contains("root")
    );
    assert!(
        refused(Mount {
            propagation: 2,
            uid_mappings: vec![Default::default()],
            ..base.clone()
        })
        .contains("Bidirectional")
    );
    assert!(
        refused(Mount {
            recursive_read_only: true,
            ..base.clone()
        })
        .contains("readonly")
    );
    assert!(
        refused(Mount {
            recursive_read_only: true,
            readonly: true,
            propagation: 1,
            ..base.clone()
        })
        .contains("PRIVATE")
    );
    assert_eq!(
        refused(Mount {
            container_path: String::new(),
            ..base
        }),
        "mount.container_path is missing"
    );
}

#[test]
fn invalid_image_volumes_are_rejected_by_name() {
    let image = Mount {
        container_path: "/data".into(),
        readonly: true,
        image: Some(ImageSpec {
            image: "x:1".into(),
            image_ref: "sha256:abc".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(
        refused(Mount {
            readonly: false,
            ..image.clone()
        })
        .contains("read-only")
    );
    assert!(
        refused(Mount {
            host_path: "/tmp".into(),
            ..image.clone()
        })
        .contains("mount.host_path")
    );
    for path in ["/etc", "a/../../etc"] {
        assert!(
            refused(Mount {
                image_sub_path: path.into(),
                ..image.clone()
            })
            .contains(path)
        );
    }
}

#[test]
fn resources_are_converted_to_oci() {
    let mut config = container();
    config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
        cpu_shares: 512,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: -997,
        cpuset_cpus: "0".into(),
        unified: [("memory.high".to_owned(), "1000".to_owned())].into(),
        ..Default::default()
    });
    let spec = made(&config, json!({})).unwrap();
    let resources = &spec["linux"]["resources"];
    assert_eq!(
        resources["cpu"],
        json!({"shares": 512, "quota": 50_000, "period": 100_000})
    );
    assert_eq!(resources["memory"], json!({"limit": 64 << 20}));
    assert_eq!(resources["unified"], json!({"memory.high": "1000"}));
    assert_eq!(spec["process"]["oomScoreAdj"], -997);
    let refused =
        |limits: LinuxContainerResources| super::resources(Some(&limits)).unwrap_err().to_string();
    assert!(
        refused(LinuxContainerResources {
            cpu_shares: -1,
            ..Default::default()
        })
        .contains("shares")
    );
    assert!(
        refused(LinuxContainerResources {
            unified: [("../x".to_owned(), String::new())].into(),
            ..Default::default()
        })
        .contains("../x")
    );
}

#[test]
fn unsupported_fields_are_rejected_by_name() {
    let error = |config: &ContainerConfig| made(config, json!({})).unwrap_err().to_string();
    let mut config = container();
    config.devices = vec![Device {
        host_path: "/srv/disk".into(),
        ..Default::default()
    }];
    assert!(error(&config).contains("/srv/disk"));
    let mut config = container();
    security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: 2,
        localhost_ref: "p.json".into(),
    });
    assert!(error(&config).contains("p.json"));
    let mut config = container();
    security(&mut config).apparmor = Some(SecurityProfile {
        profile_type: 2,
        localhost_ref: "k8s-x".into(),
    });
    let text = error(&config);
    assert!(
        text.contains("apparmor") && text.contains("k8s-x"),
        "{text}"
    );
    let mut config = container();
    security(&mut config).namespace_options = Some(NamespaceOption {
        network: 2,
        ..Default::default()
    });
    assert!(error(&config).contains("does not use the host network"));
    let mut config = container();
    config.cdi_devices = vec![CdiDevice {
        name: "vendor.com/gpu=1".into(),
    }];
    assert!(error(&config).contains("vendor.com/gpu=1"));
}

#[test]
fn security_context_is_converted() {
    let mut config = container();
    let context = security(&mut config);
    context.seccomp = Some(SecurityProfile::default());
    context.masked_paths = vec!["/proc/kcore".into()];
    context.readonly_paths = vec!["/proc/sys".into()];
    context.namespace_options = Some(NamespaceOption {
        pid: 2,
        ipc: 2,
        ..Default::default()
    });
    config.devices = vec![Device {
        host_path: "/dev/fuse".into(),
        ..Default::default()
    }];
    let spec = made(&config, json!({})).unwrap();
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
    assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/sys"]));
    assert_eq!(
        spec["linux"]["namespaces"],
        json!([{"type": "mount"}, {"type": "cgroup"}])
    );
    let listed = |m: &&Value| m["destination"] == "/proc/sysvipc";
    assert!(
        spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .any(|m| listed(&m))
    );
    let devices = spec["annotations"]["boxlite.devices"].as_str().unwrap();
    assert!(devices.contains("/dev/fuse"), "{devices}");
    security(&mut config).privileged = true;
    let spec = made(&config, json!({})).unwrap();
    assert_eq!(spec["linux"]["seccomp"], Value::Null);
    assert_eq!(spec["linux"]["maskedPaths"], json!([]));
}

#[test]
fn container_user_namespace_must_match_the_pod() {
    let mapping = || IdMapping {
        host_id: 1000,
        container_id: 0,
        length: 100_000,
    };
    let options = NamespaceOption {
        userns_options: Some(UserNamespace {
            mode: 0,
            uids: vec![mapping()],
            gids: vec![mapping()],
        }),
        ..Default::default()
    };
    let mut mapped = pod();
    mapped
        .config
        .get_or_insert_default()
        .linux
        .get_or_insert_default()
        .security_context
        .get_or_insert_default()
        .namespace_options = Some(options.clone());
    let mut config = container();
    let spec = made_in(&mapped, &config, json!({})).unwrap();
    assert_eq!(
        spec["linux"]["uidMappings"],
        json!([{"containerID": 0, "hostID": 1000, "size": 100_000}])
    );
    assert_eq!(spec["linux"]["gidMappings"], spec["linux"]["uidMappings"]);
    let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
    assert!(namespaces.contains(&json!({"type": "user"})));
    security(&mut config).namespace_options = Some(options);
    assert!(made_in(&mapped, &config, json!({})).is_ok());
    let error = made(&config, json!({})).unwrap_err().to_string();
    assert!(error.contains("differs from the pod sandbox"), "{error}");
}

#[test]
fn stop_signal_of_the_image() {
    assert_eq!(
        image_stop_signal(&image(json!({"StopSignal": "SIGQUIT"}))),
        Some(3)
    );
    assert_eq!(
        image_stop_signal(&image(json!({"StopSignal": "SIGNOPE"}))),
        None
    );
    assert_eq!(image_stop_signal(&image(json!({}))), None);
}

proptest! {
    #[test]
    fn later_variable_replaces_earlier_ones(pairs in prop::collection::vec(("[A-C]", "\\PC{0,4}"), 0..8)) {
        let mut config = container();
        config.envs = pairs.iter().map(|(k, v)| KeyValue { key: k.clone(), value: v.clone().into() }).collect();
        let spec = made(&config, json!({})).unwrap();
        let env: Vec<String> = serde_json::from_value(spec["process"]["env"].clone()).unwrap();
        for key in ["A", "B", "C"] {
            let last = pairs.iter().rev().find(|(k, _)| k == key).map(|(k, v)| format!("{k}={v}"));
            let have: Vec<_> = env.iter().filter(|e| e.starts_with(&format!("{key}="))).cloned().collect();
            prop_assert_eq!(have, last.into_iter().collect::<Vec<_>>());
        }
    }
}
