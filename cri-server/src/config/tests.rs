//! Tests of the configuration: the printed default is the default, and every mistake is reported.

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

#[test]
fn the_printed_default_is_the_default() {
    assert_eq!(parse(DEFAULT_TOML).unwrap(), Config::default());
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn the_printed_default_names_every_key() {
    // Each value changed in the text must change the result: so no key stands there in vain.
    let table: toml::Table = toml::from_str(DEFAULT_TOML).unwrap();
    let keys: usize = table
        .values()
        .map(|value| value.as_table().map_or(1, toml::Table::len))
        .sum();
    assert_eq!(keys, 37, "a key was added: add it to default.toml and here");
}

#[test]
fn every_mistake_is_reported_with_key_and_value() {
    let found = mistakes(
        "root = \"var/lib\"\nvmm = \"kvm\"\nfoo = 1\n[cni]\nbin_dirs = []\ntimeout_seconds = 0\nbar = \"x\"\n[pod]\nvcpus = 300\n[nope]\na = 1\n",
    );
    let mut shown: Vec<String> = found.iter().map(ToString::to_string).collect();
    shown.sort();
    assert_eq!(
        shown,
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
fn a_value_instead_of_a_table_is_named() {
    assert_eq!(
        mistakes("cni = 3")[0].to_string(),
        "cni = 3: must be a table"
    );
}

#[test]
fn one_directory_cannot_be_both() {
    assert_eq!(mistakes("root = \"/x\"\nstate = \"/x\"")[0].key, "state");
}

#[test]
fn sockets_are_unix_and_short() {
    assert!(parse("listen = \"tcp://1.2.3.4:5\"").is_err());
    assert!(parse(&format!("listen = \"/{}\"", "a".repeat(107))).is_err());
    let config = parse("listen = \"unix:///tmp/x.sock\"").unwrap();
    assert_eq!(config.listen, Path::new("/tmp/x.sock"));
}

#[test]
fn metrics_can_be_off() {
    let config = parse("[metrics]\nlisten = \"off\"").unwrap();
    assert_eq!(config.metrics.listen, None);
}

#[test]
fn a_missing_file_is_named() {
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
