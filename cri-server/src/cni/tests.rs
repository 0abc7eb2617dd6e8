//! CNI with the real plugins of Debian's containernetworking-plugins (bridge, host-local, portmap) and with misbehaving scripts.
//!
//! Each test re-executes itself under `unshare` in private network and mount namespaces, so the machine's network is not
//! changed.

use super::*;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PLUGINS: &str = "/usr/lib/cni";
const POD: &str = "aa11";

fn inside(test: &str) -> bool {
    crate::inner_run::inside(&format!("cni::tests::{test}"))
}

fn run(work: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work);
}

struct Node {
    dir: TempDir,
    cni: Cni,
}

impl Node {
    fn new(conflist: serde_json::Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["net.d", "bin"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let node = Self {
            cni: cni(dir.path(), Duration::from_secs(20)),
            dir,
        };
        node.conf("10-test.conflist", &conflist.to_string());
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn conf(&self, name: &str, text: &str) {
        std::fs::write(self.path("net.d").join(name), text).unwrap();
    }

    fn script(&self, name: &str, body: &str) {
        let path = self.path("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn leases(&self) -> usize {
        let Ok(entries) = std::fs::read_dir(self.path("ipam/testnet")) else {
            return 0;
        };
        entries
            .filter(|entry| {
                entry
                    .as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .starts_with("10.")
            })
            .count()
    }

    fn assert_clean(&self) {
        assert_eq!(self.leases(), 0, "leases remain");
        assert!(!self.cni.namespace(POD).exists(), "the namespace remains");
        assert!(
            self.cni.record(POD).unwrap().is_none(),
            "the record remains"
        );
    }
}

fn cni(dir: &Path, timeout: Duration) -> Cni {
    let config = CniConfig {
        conf_dir: dir.join("net.d"),
        bin_dirs: vec![dir.join("bin"), PLUGINS.into()],
        timeout,
    };
    Cni::new(&config, &Layout::new(&dir.join("root"), &dir.join("state")))
}

fn bridge(dir: &Path) -> serde_json::Value {
    serde_json::json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
        "ipam": {
            "type": "host-local", "dataDir": dir.join("ipam"),
            "ranges": [[{"subnet": "10.77.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    })
}

/// Returns a node whose network is the bridge and then `more`.
fn bridged(more: &[serde_json::Value]) -> Node {
    let node = Node::new(serde_json::json!({}));
    let mut plugins = vec![bridge(node.dir.path())];
    plugins.extend_from_slice(more);
    let list = serde_json::json!({"cniVersion": "1.0.0", "name": "testnet", "plugins": plugins});
    node.conf("10-test.conflist", &list.to_string());
    node
}

fn pod() -> PodNetwork {
    PodNetwork {
        sandbox_id: POD.into(),
        name: "web".into(),
        namespace: "default".into(),
        uid: "u".into(),
        port_mappings: vec![PortMap {
            host_port: 8080,
            container_port: 80,
            protocol: "tcp".into(),
            host_ip: String::new(),
        }],
        ..Default::default()
    }
}

fn in_namespace(path: &Path, command: &[&str]) -> String {
    let output = Command::new("nsenter")
        .arg(format!("--net={}", path.display()))
        .args(command)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn add_check_and_del_with_real_plugins() {
    if !inside("add_check_and_del_with_real_plugins") {
        return;
    }
    run(async {
        let node = bridged(&[
            serde_json::json!({"type": "portmap", "capabilities": {"portMappings": true}}),
        ]);
        let record = node.cni.attach(&pod()).await.unwrap();
        let addresses = record.addresses();
        assert_eq!(addresses.len(), 1);
        let output = in_namespace(&record.netns, &["ip", "-o", "addr"]);
        assert!(output.contains(&format!("{}/24", addresses[0])), "{output}");
        assert!(
            output.contains("127.0.0.1/8"),
            "loopback is not up: {output}"
        );
        assert_eq!(node.leases(), 1);
        let rules = Command::new("iptables-save")
            .args(["-t", "nat"])
            .output()
            .unwrap();
        assert!(
            String::from_utf8_lossy(&rules.stdout).contains("--dport 8080"),
            "no rule for the port"
        );
        node.cni.detach(POD).await.unwrap();
        node.assert_clean();
        let rules = Command::new("iptables-save")
            .args(["-t", "nat"])
            .output()
            .unwrap();
        assert!(
            !String::from_utf8_lossy(&rules.stdout).contains("--dport 8080"),
            "the port's rule remains"
        );
        node.cni.detach(POD).await.unwrap();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn collect_removes_networks_after_restart_and_reboot() {
    if !inside("collect_removes_networks_after_restart_and_reboot") {
        return;
    }
    run(async {
        let node = bridged(&[]);
        node.cni.attach(&pod()).await.unwrap();
        // Without portmap, whose version 1.1.1 expects IPv6 rules for a pod without IPv6.
        node.cni.check(POD).await.unwrap();
        // The directory has changed since: DEL uses the record.
        node.conf("10-test.conflist", "{}");
        cni(node.dir.path(), Duration::from_secs(20))
            .detach(POD)
            .await
            .unwrap();
        node.assert_clean();

        let node = bridged(&[]);
        let record = node.cni.attach(&pod()).await.unwrap();
        nix::mount::umount2(&record.netns, nix::mount::MntFlags::MNT_DETACH).unwrap();
        std::fs::remove_file(&record.netns).unwrap();
        node.cni.detach(POD).await.unwrap();
        node.assert_clean();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn collect_removes_leaks_and_keeps_live_pods() {
    if !inside("collect_removes_leaks_and_keeps_live_pods") {
        return;
    }
    run(async {
        let node = bridged(&[]);
        node.cni.attach(&pod()).await.unwrap();
        let live = PodNetwork {
            sandbox_id: "bb22".into(),
            ..pod()
        };
        node.cni.attach(&live).await.unwrap();
        // A crash between namespace and record leaves only the namespace.
        netns::create(node.cni.namespace("cc33")).await.unwrap();
        assert_eq!(node.cni.collect(&["bb22".to_owned()].into()).await.0, 2);
        assert_eq!(node.leases(), 1);
        assert!(node.cni.record("bb22").unwrap().is_some());
        assert!(!node.cni.namespace("cc33").exists());
        node.cni.detach("bb22").await.unwrap();
        node.assert_clean();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn concurrent_detaches_both_succeed() {
    if !inside("concurrent_detaches_both_succeed") {
        return;
    }
    run(async {
        let node = bridged(&[serde_json::json!({"type": "once"})]);
        // Fails while another DEL of the sandbox runs: a directory is the lock.
        node.script(
            "once",
            r#"[ "$CNI_COMMAND" = DEL ] || { echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.2/24"}]}'; exit; }
mkdir "$(dirname "$0")/running" || { echo '{"code":999,"msg":"two at once"}'; exit 1; }
sleep 0.3; rmdir "$(dirname "$0")/running""#,
        );
        node.cni.attach(&pod()).await.unwrap();
        let (first, second) = tokio::join!(node.cni.detach(POD), node.cni.detach(POD));
        first.unwrap();
        second.unwrap();
        node.assert_clean();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn interrupted_add_is_abandoned_after_second_failure() {
    if !inside("interrupted_add_is_abandoned_after_second_failure") {
        return;
    }
    run(async {
        let node = bridged(&[serde_json::json!({"type": "half"})]);
        // Behaves like bridge after an ADD that did not create its iptables chain.
        node.script(
            "half",
            r#"[ "$CNI_COMMAND" = DEL ] && echo '{"code":999,"msg":"no such chain"}' && exit 1
echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.2/24"}]}'"#,
        );
        let mut record = node.cni.attach(&pod()).await.unwrap();
        let (gone, left) = node.cni.collect(&HashSet::new()).await;
        assert_eq!((gone, left.len()), (0, 1));
        let left = node.cni.release_again(left).await;
        assert_eq!(left.len(), 1, "the record of a completed ADD remains");
        record.result = None;
        record.save(&node.cni.records).unwrap();
        assert!(node.cni.release_again(left).await.is_empty());
        node.assert_clean();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn gc_lists_live_attachments() {
    if !inside("gc_lists_live_attachments") {
        return;
    }
    run(async {
        for (version, switch, expected) in [
            ("1.1.0", serde_json::json!(false), true),
            ("1.1.0", serde_json::json!(true), false),
            ("1.0.0", serde_json::json!(false), false),
        ] {
            let node = Node::new(serde_json::json!({
                "cniVersion": version, "name": "gcnet", "disableGC": switch,
                "plugins": [{"type": "stateful", "own": 1}],
            }));
            node.script(
                "stateful",
                r#"[ "$CNI_COMMAND" = GC ] && exec cat > "$(dirname "$0")/gc"
[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.2/24"}]}'; exit 0"#,
            );
            node.cni.attach(&pod()).await.unwrap();
            let gone = PodNetwork {
                sandbox_id: "bb22".into(),
                ..pod()
            };
            node.cni.attach(&gone).await.unwrap();
            assert_eq!(node.cni.collect(&[POD.to_owned()].into()).await.0, 1);
            let seen = std::fs::read(node.path("bin/gc"));
            assert_eq!(seen.is_ok(), expected, "{version} {switch}");
            if let Ok(text) = seen {
                let input: serde_json::Value = serde_json::from_slice(&text).unwrap();
                assert_eq!(input["name"], "gcnet");
                assert_eq!(input["own"], 1);
                assert_eq!(
                    input["cni.dev/valid-attachments"],
                    serde_json::json!([{"containerID": POD, "ifname": "eth0"}])
                );
            }
            node.cni.detach(POD).await.unwrap();
        }
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn add_error_is_quoted_and_undone() {
    if !inside("add_error_is_quoted_and_undone") {
        return;
    }
    run(async {
        let node = bridged(&[serde_json::json!({"type": "refuse"})]);
        node.script(
            "refuse",
            r#"[ "$CNI_COMMAND" = DEL ] && { echo deleted > "$(dirname "$0")/deleted"; exit 0; }
echo '{"cniVersion":"1.0.0","code":11,"msg":"no port left","details":"all of 4 taken"}'; exit 1"#,
        );
        let error = node.cni.attach(&pod()).await.unwrap_err();
        let text = boxlite_runtime::report(&error);
        for part in [
            "testnet",
            "ADD",
            "refuse",
            "code 11: no port left (all of 4 taken)",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert!(node.path("bin/deleted").exists(), "DEL did not run");
        node.assert_clean();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn hanging_plugin_is_killed_with_its_children() {
    if !inside("hanging_plugin_is_killed_with_its_children") {
        return;
    }
    run(async {
        let node = bridged(&[serde_json::json!({"type": "hang"})]);
        node.script(
            "hang",
            r#"[ "$CNI_COMMAND" = DEL ] && exit 0
sleep 1000 & echo $! > "$(dirname "$0")/child"; wait"#,
        );
        let impatient = cni(node.dir.path(), Duration::from_secs(1));
        let begun = Instant::now();
        let error = impatient.attach(&pod()).await.unwrap_err();
        assert!(
            boxlite_runtime::report(&error).contains("did not answer within 1 s"),
            "{error:?}"
        );
        assert!(begun.elapsed() < Duration::from_secs(15));
        let child = std::fs::read_to_string(node.path("bin/child")).unwrap();
        let status = Path::new("/proc").join(child.trim()).join("status");
        // A killed process that has not been reaped yet counts as ended.
        let gone =
            || std::fs::read_to_string(&status).map_or(true, |text| text.contains("State:\tZ"));
        while !gone() {
            assert!(
                begun.elapsed() < Duration::from_secs(15),
                "the plugin's child lives"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        node.assert_clean();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn plugin_with_endless_output_is_killed() {
    if !inside("plugin_with_endless_output_is_killed") {
        return;
    }
    run(async {
        let node = bridged(&[serde_json::json!({"type": "flood"})]);
        node.script("flood", r#"[ "$CNI_COMMAND" = DEL ] && exit 0; exec yes"#);
        let error = node.cni.attach(&pod()).await.unwrap_err();
        assert!(
            boxlite_runtime::report(&error).contains("more than 1048576 bytes"),
            "{error:?}"
        );
        node.assert_clean();
    });
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn del_is_retried_after_a_failure() {
    if !inside("del_is_retried_after_a_failure") {
        return;
    }
    run(async {
        let node = bridged(&[serde_json::json!({"type": "sticky"})]);
        node.script("sticky", r#"[ "$CNI_COMMAND" = DEL ] && ! [ -e "$(dirname "$0")/free" ] && { echo stuck >&2; exit 3; }; cat > /dev/null"#);
        node.cni.attach(&pod()).await.unwrap();
        let error = node.cni.detach(POD).await.unwrap_err();
        assert!(
            boxlite_runtime::report(&error).contains("stuck"),
            "{error:?}"
        );
        assert_eq!(node.leases(), 0, "the other plugin's DEL did not run");
        assert!(node.cni.record(POD).unwrap().is_some());
        std::fs::write(node.path("bin/free"), "").unwrap();
        node.cni.detach(POD).await.unwrap();
        node.assert_clean();
    });
}

#[test]
fn readiness_reports_reason_and_follows_changes() {
    let node = Node::new(serde_json::json!({}));
    std::fs::remove_file(node.path("net.d/10-test.conflist")).unwrap();
    let reason = |node: &Node| boxlite_runtime::report(&node.cni.ready().unwrap_err());
    assert!(
        reason(&node).contains("no network configuration"),
        "{}",
        reason(&node)
    );
    node.conf("05-broken.conf", "{");
    assert!(
        reason(&node).contains("05-broken.conf: not JSON"),
        "{}",
        reason(&node)
    );
    node.conf(
        "10-old.conf",
        r#"{"cniVersion":"0.2.0","name":"a","type":"bridge"}"#,
    );
    assert!(reason(&node).contains("0.2.0"), "{}", reason(&node));
    node.conf(
        "20-escape.conf",
        r#"{"cniVersion":"1.0.0","name":"a","type":"../sh"}"#,
    );
    assert!(
        reason(&node).contains("not a program name"),
        "{}",
        reason(&node)
    );
    node.conf(
        "30-absent.conf",
        r#"{"cniVersion":"1.0.0","name":"a","type":"no-such-plugin"}"#,
    );
    assert!(
        reason(&node).contains("program \"no-such-plugin\" not found"),
        "{}",
        reason(&node)
    );
    node.conf(
        "25-fine.conf",
        r#"{"cniVersion":"1.0.0","name":"b","type":"bridge"}"#,
    );
    assert_eq!(node.cni.ready().unwrap().name, "b");
    std::fs::remove_dir_all(node.path("net.d")).unwrap();
    assert!(reason(&node).contains("failed to read the CNI configuration directory"));
}

#[test]
fn runtime_config_matches_plugin_capabilities() {
    let text = br#"{"cniVersion":"1.0.0","name":"n","plugins":[
        {"type":"a","capabilities":{"portMappings":true,"bandwidth":true,"ipRanges":true,"dns":true}},
        {"type":"b","capabilities":{"portMappings":false},"mtu":9}]}"#;
    let conf = conf::parse(text, Path::new("x")).unwrap();
    let network = PodNetwork {
        bandwidth: Bandwidth::new(Some(1000), None),
        ip_ranges: vec!["10.1.0.0/24".into()],
        ..pod()
    };
    let previous = serde_json::json!({"ips": []});
    assert_eq!(
        attachment::input(&conf, &conf.plugins[0], &network, Some(&previous)),
        serde_json::json!({
            "type": "a", "name": "n", "cniVersion": "1.0.0", "prevResult": {"ips": []},
            "runtimeConfig": {
                "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
                "bandwidth": {"ingressRate": 1000, "ingressBurst": 2147483647, "egressRate": 0, "egressBurst": 0},
                "ipRanges": [[{"subnet": "10.1.0.0/24"}]],
            },
        })
    );
    assert_eq!(
        attachment::input(&conf, &conf.plugins[1], &network, None),
        serde_json::json!({"type": "b", "name": "n", "cniVersion": "1.0.0", "mtu": 9})
    );
}

#[test]
fn pod_name_cannot_inject_arguments() {
    let network = PodNetwork {
        name: "a;K8S_POD_NAMESPACE=kube-system".into(),
        ..pod()
    };
    let environment = attachment::environment("ADD", &network, "/n");
    let args = &environment
        .iter()
        .find(|(key, _)| *key == "CNI_ARGS")
        .unwrap()
        .1;
    assert_eq!(args.matches("K8S_POD_NAMESPACE=").count(), 1);
}

#[test]
fn result_of_every_version_yields_addresses() {
    let read = |text: &str| {
        let value = result::parse_value(text.as_bytes()).unwrap().unwrap();
        CniResult::from_value(&value)
            .addresses()
            .map(|ip| ip.to_string())
            .collect::<Vec<_>>()
    };
    let one = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/n"}],
        "ips":[{"address":"10.0.0.2/24","interface":1},{"address":"fd00::2/64","interface":1},{"address":"10.0.0.1/24","interface":0}]}"#;
    assert_eq!(read(one), ["10.0.0.2", "fd00::2"]);
    let old = r#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.2/24","gateway":"10.0.0.1"}]}"#;
    assert_eq!(read(old), ["10.0.0.2"]);
    assert!(read(r#"{"ips":[{"address":"nonsense"},{"address":5}],"interfaces":7}"#).is_empty());
    assert!(result::parse_value(b" \n").unwrap().is_none());
    assert!(matches!(
        result::parse_value(b"[1]"),
        Err(PluginError::NoObject)
    ));
    assert!(matches!(
        result::parse_value(b"x"),
        Err(PluginError::NoJson { .. })
    ));
}

proptest::proptest! {
    #[test]
    fn no_configuration_panics(text in "\\PC{0,200}") {
        let _ = conf::parse(text.as_bytes(), Path::new("x"));
    }
}

#[test]
fn fuzz_results_of_plugins_and_conflists_are_read_or_rejected() {
    let words = [
        "null",
        "\"ips\":",
        "\"address\":",
        "\"10.0.0.1/33\"",
        "\"fe80::1%eth0/64\"",
        "[",
        "{",
    ];
    boxlite_fuzz::Fuzz::new("cni").words(&words).run(|input| {
        drop(super::conf::parse(input, Path::new("/x.conflist")));
        if let Ok(value) = serde_json::from_slice(input) {
            let result = super::result::CniResult::from_value(&value);
            assert!(result.addresses().count() <= input.len());
        }
    });
}
