//! Adaptation of specs as written by the kubelet, containerd and others.

use super::*;
use serde_json::{Value, json};

fn user() -> ResolvedUser {
    ResolvedUser {
        uid: 33,
        gid: 34,
        additional_gids: vec![50],
        home: "/srv".into(),
    }
}

fn facts(user: &ResolvedUser) -> ContainerFacts<'_> {
    ContainerFacts {
        rootfs: Path::new("/run/boxlite/c/x/rootfs"),
        read_only: true,
        cgroup: "/pod/x".into(),
        pid_namespace: PidNamespace::Own,
        user_namespace: None,
        terminal: false,
        user,
        mqueue: false,
    }
}

fn full() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {"args": ["sh"], "cwd": "/", "env": ["A=1"], "user": {"uid": 1, "gid": 2, "username": "web"},
                    "apparmorProfile": "cri", "selinuxLabel": "x", "oomScoreAdj": 7},
        "root": {"path": "/host/rootfs"},
        "hostname": "pod",
        "hooks": {"prestart": [{"path": "/bin/hook"}]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue"},
            {"destination": "/data", "type": "bind", "source": "/run/boxlite/share/m/x/0", "options": ["rbind"]}
        ],
        "linux": {
            "namespaces": [{"type": "network", "path": "/var/run/netns/host"}, {"type": "user"}, {"type": "ipc"}],
            "cgroupsPath": "/kubepods/x",
            "resources": {"memory": {"limit": 1000}},
            "sysctl": {"net.ipv4.ip_forward": "1"},
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "mountLabel": "x",
            "maskedPaths": ["/proc/kcore"]
        }
    })
}

#[test]
fn adapt_replaces_host_settings_and_keeps_the_rest() {
    let mut spec = parse(full().to_string().as_bytes()).unwrap();
    let user = user();
    let extracted = adapt(&mut spec, &facts(&user)).unwrap();
    assert_eq!(
        extracted
            .resources
            .unwrap()
            .memory()
            .as_ref()
            .unwrap()
            .limit(),
        Some(1000)
    );
    assert_eq!(extracted.sysctls["net.ipv4.ip_forward"], "1");
    let result = serde_json::to_value(&spec).unwrap();
    assert_eq!(
        result["root"],
        json!({"path": "/run/boxlite/c/x/rootfs", "readonly": true})
    );
    assert_eq!(
        result["linux"]["namespaces"],
        json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "pid"}])
    );
    assert_eq!(result["linux"]["cgroupsPath"], "/pod/x");
    assert_eq!(result["linux"]["maskedPaths"], json!(["/proc/kcore"]));
    for gone in ["resources", "sysctl", "seccomp", "mountLabel"] {
        assert_eq!(result["linux"][gone], Value::Null, "{gone}");
    }
    for gone in ["hooks", "hostname"] {
        assert_eq!(result[gone], Value::Null, "{gone}");
    }
    let process = &result["process"];
    assert_eq!(
        process["user"],
        json!({"uid": 33, "gid": 34, "additionalGids": [50]})
    );
    assert_eq!(process["env"], json!(["A=1", "HOME=/srv"]));
    assert_eq!(process["apparmorProfile"], Value::Null);
}

#[test]
fn adapt_binds_shm_and_drops_unsupported_mounts() {
    let mut spec = parse(full().to_string().as_bytes()).unwrap();
    let user = user();
    adapt(&mut spec, &facts(&user)).unwrap();
    let mounts = serde_json::to_value(spec.mounts()).unwrap();
    let destinations: Vec<_> = mounts
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| mount["destination"].clone())
        .collect();
    assert_eq!(destinations, ["/proc", "/dev/shm", "/data"]);
    assert_eq!(mounts[1]["type"], "bind");
    assert_eq!(mounts[1]["source"], "/dev/shm");
}

#[test]
fn adapt_in_user_namespace_binds_sysfs() {
    let mut value = full();
    value["mounts"] = json!([{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]}]);
    let mut spec = parse(value.to_string().as_bytes()).unwrap();
    let user = user();
    let facts = ContainerFacts {
        user_namespace: Some("/proc/5/ns/user".into()),
        pid_namespace: PidNamespace::Vm,
        ..facts(&user)
    };
    adapt(&mut spec, &facts).unwrap();
    let result = serde_json::to_value(&spec).unwrap();
    assert_eq!(
        result["mounts"][0],
        json!({"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "nosuid", "ro"]})
    );
    assert_eq!(
        result["linux"]["namespaces"],
        json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "user", "path": "/proc/5/ns/user"}])
    );
}

#[test]
fn adapt_moves_privileges_to_the_confinement() {
    let mut value = full();
    value["process"]["noNewPrivileges"] = json!(true);
    value["process"]["capabilities"] = json!({"bounding": ["CAP_CHOWN"]});
    value["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    let mut spec = parse(value.to_string().as_bytes()).unwrap();
    let user = user();
    let confinement = adapt(&mut spec, &facts(&user)).unwrap().confinement;
    assert!(confinement.no_new_privileges && confinement.seccomp.is_some());
    assert!(confinement.capabilities.is_some());
    let process = serde_json::to_value(spec.process()).unwrap();
    for gone in ["capabilities", "noNewPrivileges"] {
        assert_eq!(process[gone], Value::Null, "{gone}");
    }
    value["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
    let mut spec = parse(value.to_string().as_bytes()).unwrap();
    let error = adapt(&mut spec, &facts(&user)).unwrap_err().to_string();
    assert!(
        error.contains("linux.seccomp") && error.contains("NOTIFY"),
        "{error}"
    );
}

#[test]
fn adapt_names_a_joined_pid_namespace() {
    let mut spec = parse(full().to_string().as_bytes()).unwrap();
    let user = user();
    let facts = ContainerFacts {
        pid_namespace: PidNamespace::Joined("/proc/5/ns/pid".into()),
        ..facts(&user)
    };
    adapt(&mut spec, &facts).unwrap();
    let linux = serde_json::to_value(spec.linux()).unwrap();
    assert_eq!(
        linux["namespaces"][2],
        json!({"type": "pid", "path": "/proc/5/ns/pid"})
    );
}

#[test]
fn parse_invalid_spec_names_the_field() {
    let broken = |change: fn(&mut Value)| {
        let mut value = full();
        change(&mut value);
        parse(value.to_string().as_bytes()).unwrap_err().to_string()
    };
    assert!(broken(|v| v["process"]["args"] = json!([])).contains("process.args"));
    assert!(broken(|v| v["process"]["cwd"] = json!("relative")).contains("process.cwd"));
    assert!(broken(|v| v["process"]["args"] = json!(["a\0b"])).contains("NUL"));
    assert!(broken(|v| v["process"] = Value::Null).contains("process is missing"));
    assert!(parse(b"{").is_err());
}

fn base() -> ProcessPlan {
    let mut spec = parse(full().to_string().as_bytes()).unwrap();
    let user = user();
    adapt(&mut spec, &facts(&user)).unwrap();
    process_plan(&spec, &Confinement::default()).unwrap()
}

#[test]
fn exec_plan_inherits_missing_fields() {
    let base = base();
    let plan = exec_plan(br#"{"args":["true"]}"#, false, &base).unwrap();
    assert_eq!(plan.args, ["true"]);
    assert_eq!(
        (plan.env.as_slice(), plan.cwd.as_path()),
        (base.env.as_slice(), Path::new("/"))
    );
    assert_eq!(plan.user, base.user);
    assert_eq!(plan.oom_score_adj, 7);
    let plan = exec_plan(
        br#"{"args":["true"],"cwd":"/tmp","env":["B=2"],"user":{"uid":5,"gid":6}}"#,
        true,
        &base,
    )
    .unwrap();
    assert_eq!(plan.env, ["B=2", "TERM=xterm"]);
    assert_eq!(
        (plan.user.uid, plan.user.gid, plan.cwd.as_path()),
        (5, 6, Path::new("/tmp"))
    );
}

#[test]
fn exec_plan_of_another_user_drops_home() {
    let plan = exec_plan(
        br#"{"args":["true"],"user":{"uid":5,"gid":6}}"#,
        false,
        &base(),
    )
    .unwrap();
    assert_eq!(plan.env, ["A=1"]);
}

#[test]
fn exec_plan_without_command_is_rejected() {
    assert!(
        exec_plan(b"{}", false, &base())
            .unwrap_err()
            .to_string()
            .contains("process.args")
    );
}

#[test]
fn user_plan_merges_groups_only_by_annotation() {
    let mut value = full();
    assert!(!user_plan(&parse(value.to_string().as_bytes()).unwrap()).merge_groups);
    value["annotations"] = json!({"boxlite.groups": "merge"});
    let plan = user_plan(&parse(value.to_string().as_bytes()).unwrap());
    assert!(plan.merge_groups);
    assert_eq!(plan.name.as_deref(), Some("web"));
}
