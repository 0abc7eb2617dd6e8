//! Tests of the configuration: the printed default is the default, the dump loads again, and every mistake is reported.

use super::*;
use proptest::prelude::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("boxlite.toml"))
}

fn mistakes(text: &str) -> Vec<Mistake> {
    match parse(text) {
        Err(ConfigError::Mistakes { mistakes, .. }) => mistakes,
        other => panic!("expected mistakes, got {other:?}"),
    }
}

fn keys(text: &str) -> usize {
    let table: toml::Table = toml::from_str(text).unwrap();
    table
        .values()
        .map(|value| value.as_table().map_or(1, toml::Table::len))
        .sum()
}

/// Number of keys. A new one belongs into default.toml, the dump and [`CHANGED`], too.
const KEYS: usize = 53;

fn printed_default() -> String {
    default_toml(&prefix(), &Paths::default().libkrunfw)
}

#[test]
fn printed_default_is_the_default() {
    assert_eq!(parse(&printed_default()).unwrap(), Config::default());
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn printed_default_names_every_key() {
    // scratch_dir is commented out: its default depends on root.
    let text = printed_default().replace("#scratch_dir", "scratch_dir");
    assert_eq!(keys(&text), KEYS);
}

#[test]
fn dump_loads_as_the_same_configuration() {
    let text = Config::default().to_toml();
    assert_eq!(keys(&text), KEYS, "{text}");
    let default = Config {
        scratch_dir: Some("/var/lib/boxlite/scratch".into()),
        ..Config::default()
    };
    assert_eq!(parse(&text).unwrap(), default);
    let changed = parse(CHANGED).unwrap();
    assert_eq!(keys(CHANGED), KEYS);
    let text = changed.to_toml();
    assert_eq!(parse(&text).unwrap(), changed);
    let (default, changed): (toml::Table, toml::Table) = (
        toml::from_str(&Config::default().to_toml()).unwrap(),
        toml::from_str(&text).unwrap(),
    );
    for (key, value) in default {
        match value.as_table() {
            None => assert_ne!(changed[&key], value, "{key}"),
            Some(table) => {
                for (name, value) in table {
                    assert_ne!(&changed[&key][name], value, "{key}.{name}");
                }
            }
        }
    }
}

/// Every key with a value that is not the default.
const CHANGED: &str = r#"
root = "/a"
state = "/b"
scratch_dir = "/s"
listen = "unix:///c"
log_level = "debug"
vmm = "qemu"
acceleration = "kvm"
runtime_handlers = ["x"]
[paths]
guest = "/d"
shim = "/e"
libkrunfw = "/f"
qemu = "/g"
virtiofsd = "/h"
vhost_device_vsock = "/i"
passt = "/j"
[network]
without_cni = "passt"
[pod]
vcpus = 3
memory_mib = 333
overhead_mib = 90
scratch_mib = 444
debug_console = true
shared_volume_writers = "refuse"
vmm_ids = "5:6"
[pool]
size = 3
memory_mib = 2222
min_available_mib = 555
idle_seconds = 4
shapes = ["1x512", "64x1"]
[host_pods]
endpoint = "unix:///t"
handlers = ["runc"]
namespaces = ["kube-system", "n"]
[cni]
conf_dir = "/j"
bin_dirs = ["/k", "/l"]
timeout_seconds = 7
[registry]
config_path = "/m"
min_bytes_per_second = 13
pull_timeout_seconds = 14
max_partial_bytes = 15
[nri]
enable = true
socket_path = "/n"
plugin_path = "/o"
plugin_config_path = "/p"
plugin_registration_timeout_seconds = 8
plugin_request_timeout_seconds = 9
disable_connections = true
[metrics]
listen = "off"
[streaming]
address = "127.0.0.2"
port = 10
idle_timeout_seconds = 11
creation_timeout_seconds = 12
[timeouts]
run_pod_seconds = 13
drain_seconds = 14
stats_seconds = 15
"#;

#[test]
fn parse_reports_every_mistake_with_key_and_value() {
    let found = mistakes(
        "root = \"var/lib\"\nvmm = \"kvm\"\nfoo = 1\n[cni]\nbin_dirs = []\ntimeout_seconds = 0\nbar = \"x\"\n[pod]\nvcpus = 300\n[nope]\na = 1\n",
    );
    let mut printed: Vec<String> = found.iter().map(ToString::to_string).collect();
    printed.sort();
    assert_eq!(
        printed,
        [
            "cni.bar = \"x\": unknown key",
            "cni.bin_dirs = []: must name at least one directory",
            "cni.timeout_seconds = 0: must be an integer from 1 to 86400",
            "foo = 1: unknown key",
            "nope: unknown key",
            "pod.vcpus = 300: must be an integer from 1 to 64",
            "root = \"var/lib\": must be an absolute path",
            "vmm = \"kvm\": must be auto, krun or qemu",
        ]
    );
}

#[test]
fn value_instead_of_table_is_reported() {
    assert_eq!(
        mistakes("cni = 3")[0].to_string(),
        "cni = 3: must be a table"
    );
}

#[test]
fn root_equal_to_state_is_refused() {
    assert_eq!(mistakes("root = \"/x\"\nstate = \"/x\"")[0].key, "state");
}

#[test]
fn listen_must_be_a_short_unix_path() {
    assert!(parse("listen = \"tcp://1.2.3.4:5\"").is_err());
    assert!(parse(&format!("listen = \"/{}\"", "a".repeat(107))).is_err());
    let config = parse("listen = \"unix:///tmp/x.sock\"").unwrap();
    assert_eq!(config.listen, Path::new("/tmp/x.sock"));
}

#[test]
fn metrics_listen_off_disables_the_page() {
    let config = parse("[metrics]\nlisten = \"off\"").unwrap();
    assert_eq!(config.metrics.listen, None);
}

#[test]
fn load_of_missing_file_names_it() {
    let error = Config::load(Path::new("/nonexistent/boxlite.toml")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/boxlite.toml"));
}

proptest! {
    #[test]
    fn no_text_panics(text in "\\PC{0,200}") {
        let _ = parse(&text);
    }

    #[test]
    fn unknown_keys_are_always_found(key in "[a-z]{12,20}") {
        let found = mistakes(&format!("{key} = 1\n[cni]\n{key} = 2\n"));
        prop_assert_eq!(found.len(), 2);
    }
}

#[test]
fn pool_shapes_are_validated() {
    for bad in [
        "0x1",
        "65x1",
        "1x0",
        "1",
        "1x",
        "x1",
        "1x1x1",
        "1x1Mi",
        "1x99999999",
    ] {
        let found = mistakes(&format!("[pool]\nshapes = [\"2x512\", \"{bad}\"]"));
        assert_eq!(found.len(), 1, "{bad}");
        assert!(
            found[0].to_string().contains("is not a shape"),
            "{}",
            found[0]
        );
    }
}

#[test]
fn host_pods_mistakes_name_their_keys() {
    let found = mistakes(
        "listen = \"/c\"\n[host_pods]\nendpoint = \"unix:///c\"\nhandlers = [\"runc\", \"boxlite\", \"\"]\nnamespaces = []\n",
    );
    let mut printed: Vec<String> = found.iter().map(ToString::to_string).collect();
    printed.sort();
    assert_eq!(
        printed,
        [
            "host_pods.endpoint = \"/c\": must differ from listen",
            "host_pods.handlers = \"\": must not be in runtime_handlers, too",
            "host_pods.handlers = \"boxlite\": must not be in runtime_handlers, too",
        ]
    );
    for bad in ["", "Kube", "a/b", "*"] {
        let found = mistakes(&format!("[host_pods]\nnamespaces = [\"{bad}\"]"));
        assert_eq!(found[0].key, "host_pods.namespaces", "{bad}");
    }
    for bad in ["", "containerd.sock", "tcp://127.0.0.1:1"] {
        let found = mistakes(&format!("[host_pods]\nendpoint = \"{bad}\""));
        assert_eq!(found[0].key, "host_pods.endpoint", "{bad}");
    }
}
