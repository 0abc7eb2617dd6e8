//! Merging of the adjustments of several plugins, and their application to the spec.

use super::super::adjust::{self, apply};
use super::super::collect::{Creation, Updates};
use super::super::messages;
use super::container;
use boxlite_proto::cri::v1::ContainerConfig;
use boxlite_proto::nri::v1alpha1::*;
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

fn spec() -> Spec {
    serde_json::from_value(json!({
        "ociVersion": "1.0.2",
        "process": {
            "cwd": "/", "user": {"uid": 7, "gid": 8}, "args": ["sh"], "env": ["A=1", "B=2"],
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind"]},
        ],
        "annotations": {"x": "1", "boxlite.privileged": "true"},
        "linux": {"resources": {"memory": {"limit": 100}, "devices": [{"allow": false, "access": "rwm"}]}},
    }))
    .unwrap()
}

fn env(key: &str, value: &str) -> KeyValue {
    KeyValue {
        key: key.into(),
        value: value.into(),
    }
}

fn bind(target: &str, source: &str) -> Mount {
    Mount {
        destination: target.into(),
        r#type: "bind".into(),
        source: source.into(),
        options: vec!["rbind".into(), "ro".into()],
    }
}

fn wants(adjust: ContainerAdjustment) -> CreateContainerResponse {
    CreateContainerResponse {
        adjust: Some(adjust),
        ..Default::default()
    }
}

fn variables(list: &[(&str, &str)]) -> CreateContainerResponse {
    wants(ContainerAdjustment {
        env: list.iter().map(|(key, value)| env(key, value)).collect(),
        ..Default::default()
    })
}

/// Returns the spec with the plugins' adjustments, in order.
fn adjusted(answers: Vec<CreateContainerResponse>) -> Result<Value, String> {
    let described = messages::new_container("c", "pod", &ContainerConfig::default(), Some(&spec()));
    let mut creation = Creation::new(described, 2);
    for (at, answer) in answers.into_iter().enumerate() {
        creation
            .take(answer, &format!("{at}0-p"))
            .map_err(|error| error.to_string())?;
    }
    let (adjustment, _) = creation.into_parts();
    let spec = apply(&adjustment, spec()).map_err(|error| error.to_string())?;
    Ok(serde_json::to_value(spec).unwrap())
}

fn refusal(adjust: ContainerAdjustment) -> String {
    adjusted(vec![wants(adjust)]).unwrap_err()
}

fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
    ContainerAdjustment {
        linux: Some(linux),
        ..Default::default()
    }
}

#[test]
fn environment_is_set_replaced_and_removed() {
    let spec = adjusted(vec![variables(&[("B", "3"), ("C", "4"), ("-A", "")])]).unwrap();
    assert_eq!(spec["process"]["env"], json!(["B=3", "C=4"]));
}

#[test]
fn two_plugins_conflict_unless_the_second_removes_first() {
    let error = adjusted(vec![variables(&[("X", "1")]), variables(&[("X", "2")])]).unwrap_err();
    assert_eq!(
        error,
        "NRI plugins 10-p and 00-p both set Env X of container c"
    );
    let spec = adjusted(vec![
        variables(&[("X", "1")]),
        variables(&[("-X", ""), ("X", "2")]),
    ])
    .unwrap();
    assert_eq!(spec["process"]["env"], json!(["A=1", "B=2", "X=2"]));
    let args = |words: &[&str]| {
        wants(ContainerAdjustment {
            args: words.iter().map(|&word| word.to_owned()).collect(),
            ..Default::default()
        })
    };
    assert!(adjusted(vec![args(&["a"]), args(&["b"])]).is_err());
    let spec = adjusted(vec![args(&["a"]), args(&["", "b"])]).unwrap();
    assert_eq!(spec["process"]["args"], json!(["b"]));
}

#[test]
fn mounts_are_added_replaced_removed_and_nested() {
    let requested = |mounts: Vec<Mount>| {
        wants(ContainerAdjustment {
            mounts,
            ..Default::default()
        })
    };
    let removal = Mount {
        destination: "-/data".into(),
        ..Default::default()
    };
    let spec = adjusted(vec![requested(vec![
        bind("/a/b/c", "/1"),
        bind("/a", "/2"),
        removal,
    ])])
    .unwrap();
    let places: Vec<&str> = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| mount["destination"].as_str().unwrap())
        .collect();
    assert_eq!(places, ["/proc", "/a", "/a/b/c"]);
    assert_eq!(spec["mounts"][1]["source"], "/2");
    let spec = adjusted(vec![requested(vec![bind("/data", "/new")])]).unwrap();
    assert_eq!(spec["mounts"].as_array().unwrap().len(), 2);
    assert_eq!(spec["mounts"][1]["source"], "/new");
    assert!(
        adjusted(vec![
            requested(vec![bind("/data", "/1")]),
            requested(vec![bind("/data", "/2")])
        ])
        .is_err()
    );
}

#[test]
fn remaining_adjustments_are_applied_to_the_spec() {
    let adjust = ContainerAdjustment {
        annotations: [("-x".to_owned(), String::new()), ("y".into(), "2".into())].into(),
        rlimits: vec![PosixRlimit {
            r#type: "RLIMIT_NOFILE".into(),
            hard: 20,
            soft: 10,
        }],
        linux: Some(LinuxContainerAdjustment {
            devices: vec![LinuxDevice {
                path: "/dev/net/tun".into(),
                r#type: "c".into(),
                major: 10,
                minor: 200,
                file_mode: Some(OptionalFileMode { value: 0o20666 }),
                ..Default::default()
            }],
            resources: Some(LinuxResources {
                cpu: Some(LinuxCpu {
                    quota: Some(OptionalInt64 { value: 5000 }),
                    cpus: "0-1".into(),
                    ..Default::default()
                }),
                pids: Some(LinuxPids { limit: 9 }),
                ..Default::default()
            }),
            oom_score_adj: Some(OptionalInt { value: 500 }),
            cgroups_path: "/elsewhere".into(),
            sysctl: [("net.core.somaxconn".to_owned(), "512".to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let spec = adjusted(vec![wants(adjust)]).unwrap();
    assert_eq!(
        spec["annotations"],
        json!({"y": "2", "boxlite.privileged": "true"})
    );
    assert_eq!(spec["process"]["rlimits"][0]["soft"], 10);
    assert_eq!(spec["process"]["oomScoreAdj"], 500);
    let linux = &spec["linux"];
    assert_eq!(linux["devices"][0]["path"], "/dev/net/tun");
    assert_eq!(linux["devices"][0]["fileMode"], 0o666);
    assert_eq!(linux["sysctl"]["net.core.somaxconn"], "512");
    assert_eq!(linux["resources"]["memory"]["limit"], 100);
    assert_eq!(linux["resources"]["cpu"]["quota"], 5000);
    assert_eq!(linux["resources"]["pids"]["limit"], 9);
    assert_eq!(linux["resources"]["devices"][0]["allow"], false);
    assert!(linux["cgroupsPath"].is_null());
}

fn with_hook() -> ContainerAdjustment {
    let hooks = Hooks {
        poststop: vec![Hook {
            path: "/bin/hook".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    ContainerAdjustment {
        hooks: Some(hooks),
        ..Default::default()
    }
}

/// Words of an error, and the adjustment that causes it.
fn senseless() -> Vec<(&'static str, ContainerAdjustment)> {
    let device = |kind: &str, major| LinuxDevice {
        path: "/dev/x".into(),
        r#type: kind.into(),
        major,
        ..Default::default()
    };
    let with_device = |device| {
        linux(LinuxContainerAdjustment {
            devices: vec![device],
            ..Default::default()
        })
    };
    vec![
        ("hooks \"/bin/hook\"", with_hook()),
        (
            "CDI_devices \"vendor/x=1\"",
            ContainerAdjustment {
                cdi_devices: vec![CdiDevice {
                    name: "vendor/x=1".into(),
                }],
                ..Default::default()
            },
        ),
        (
            "annotations \"boxlite.privileged\"",
            ContainerAdjustment {
                annotations: [("boxlite.privileged".to_owned(), "true".to_owned())].into(),
                ..Default::default()
            },
        ),
        (
            "mounts \"/a/../b\"",
            ContainerAdjustment {
                mounts: vec![bind("/a/../b", "/")],
                ..Default::default()
            },
        ),
        (
            "env \"\"",
            ContainerAdjustment {
                env: vec![env("", "x")],
                ..Default::default()
            },
        ),
        (
            "linux.namespaces",
            linux(LinuxContainerAdjustment {
                namespaces: vec![LinuxNamespace::default()],
                ..Default::default()
            }),
        ),
        (
            "linux.seccomp_policy",
            linux(LinuxContainerAdjustment {
                seccomp_policy: Some(LinuxSeccomp::default()),
                ..Default::default()
            }),
        ),
        (
            "linux.rdt",
            linux(LinuxContainerAdjustment {
                rdt: Some(LinuxRdt {
                    clos_id: Some(OptionalString::default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        ),
        (
            "linux.devices \"/dev/x\" (b 8:0)",
            with_device(device("b", 8)),
        ),
        (
            "linux.devices \"/dev/x\" (c 195:0)",
            with_device(device("c", 195)),
        ),
        (
            "linux.resources.hugepage_limits",
            linux(LinuxContainerAdjustment {
                resources: Some(LinuxResources {
                    hugepage_limits: vec![HugepageLimit::default()],
                    ..Default::default()
                }),
                ..Default::default()
            }),
        ),
    ]
}

#[test]
fn unsupported_adjustments_are_rejected_by_name() {
    for (name, adjust) in senseless() {
        let text = refusal(adjust);
        assert!(
            text.starts_with("invalid adjustment of NRI plugin 00-p: ") && text.contains(name),
            "{name}: {text}"
        );
    }
    // Some plugins send empty messages.
    let empty = ContainerAdjustment {
        hooks: Some(Hooks::default()),
        linux: Some(LinuxContainerAdjustment {
            rdt: Some(LinuxRdt::default()),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(adjust::check(&empty, 1).is_ok());
}

#[test]
fn container_message_omits_runtime_internals() {
    let seen = messages::new_container("c", "pod", &ContainerConfig::default(), Some(&spec()));
    assert_eq!(seen.annotations.len(), 1);
    assert_eq!((seen.args, seen.env.len()), (vec!["sh".to_owned()], 2));
    assert_eq!(seen.user.unwrap().uid, 7);
    assert_eq!(seen.mounts[1].source, "/srv");
    let memory = seen.linux.unwrap().resources.unwrap().memory.unwrap();
    assert_eq!(memory.limit.unwrap().value, 100);
}

fn update(id: &str, limit: i64, ignore_failure: bool) -> ContainerUpdate {
    let memory = LinuxMemory {
        limit: Some(OptionalInt64 { value: limit }),
        ..Default::default()
    };
    ContainerUpdate {
        container_id: id.into(),
        linux: Some(LinuxContainerUpdate {
            resources: Some(LinuxResources {
                memory: Some(memory),
                ..Default::default()
            }),
        }),
        ignore_failure,
    }
}

#[test]
fn updates_of_others_are_merged_and_may_conflict() {
    let mut updates = Updates::default();
    updates.take(vec![update("a", 1, false)], "00-p").unwrap();
    updates.take(vec![update("b", 2, false)], "10-p").unwrap();
    assert!(updates.take(vec![update("a", 3, false)], "10-p").is_err());
    updates.take(vec![update("a", 3, true)], "10-p").unwrap();
    let limit = |id| updates.of(id).unwrap().memory.unwrap().limit.unwrap().value;
    assert_eq!((limit("a"), limit("b")), (1, 2));
    assert_eq!(updates.others("b").len(), 1);
    let mut creation = Creation::new(container("c"), 1);
    let own = CreateContainerResponse {
        update: vec![update("c", 1, false)],
        ..Default::default()
    };
    let error = creation.take(own, "00-p").unwrap_err().to_string();
    assert!(error.contains("while it is being created"), "{error}");
}
