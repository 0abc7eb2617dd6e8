//! Rules for dependencies between crates, checked against the manifests and Cargo.lock.

use super::{fail, root, sources};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Crates of the workspace that a crate may depend on, and the features it may enable.
type Allowed = &'static [(&'static str, &'static [&'static str])];

/// ```text
/// sys ◄─ portal, erofs, config, telemetry ◄─ runtime ◄─ cri-server
///            ▲ proto ▲    ▲────── shim-v2      guest ─► proto, sys      dist, installer, e2e ─► sys
/// e2e/hostile-agent ─► proto
/// ```
const WORKSPACE: [(&str, Allowed); 15] = [
    // Only for the tests of the others.
    ("fuzz", &[]),
    ("sys", &[("boxlite-fuzz", &[])]),
    ("proto", &[]),
    ("telemetry", &[("boxlite-sys", &[])]),
    ("erofs", &[("boxlite-fuzz", &[])]),
    ("portal", &[("boxlite-proto", &[]), ("boxlite-sys", &[])]),
    (
        "config",
        &[("boxlite-proto", &["shim"]), ("boxlite-sys", &[])],
    ),
    (
        "runtime",
        &[
            ("boxlite-config", &[]),
            ("boxlite-erofs", &[]),
            ("boxlite-fuzz", &[]),
            ("boxlite-portal", &[]),
            ("boxlite-proto", &["shim"]),
            ("boxlite-sys", &[]),
            ("boxlite-telemetry", &[]),
        ],
    ),
    (
        "cri-server",
        &[
            ("boxlite-fuzz", &[]),
            ("boxlite-config", &[]),
            ("boxlite-portal", &[]),
            ("boxlite-proto", &["cri", "nri"]),
            // The features are for tests: shims without VMs, and injected faults.
            ("boxlite-runtime", &TEST_FEATURES),
            ("boxlite-sys", &[]),
            ("boxlite-telemetry", &[]),
        ],
    ),
    (
        "shim-v2",
        &[
            ("boxlite-config", &[]),
            ("boxlite-erofs", &[]),
            ("boxlite-portal", &[]),
            ("boxlite-proto", &["shim"]),
            ("boxlite-sys", &[]),
            ("boxlite-telemetry", &[]),
        ],
    ),
    (
        "guest",
        &[
            ("boxlite-fuzz", &[]),
            ("boxlite-proto", &[]),
            ("boxlite-sys", &[]),
        ],
    ),
    ("dist", &[("boxlite-sys", &[])]),
    ("installer", &[("boxlite-sys", &[])]),
    // Helpers only: the tests have their own view of every wire format.
    ("e2e", &[("boxlite-sys", &[])]),
    // Its services are those of the guest protocol.
    ("e2e/hostile-agent", &[("boxlite-proto", &[])]),
];

/// Features of `runtime` that only dev-dependencies may enable: programs must not contain them.
const TEST_FEATURES: [&str; 2] = ["failpoints", "fake-shim"];

/// External crates that only one crate of the workspace may depend on.
const EXCLUSIVE: [(&str, &str); 7] = [
    ("libkrun", "shim-v2"),
    ("libcontainer", "guest"),
    ("k8s-cri", "e2e"),
    ("rusqlite", "runtime"),
    ("opentelemetry", "telemetry"),
    ("opentelemetry_sdk", "telemetry"),
    ("opentelemetry-otlp", "telemetry"),
];

/// Crates that must not be reachable from a crate of the workspace, directly or through others.
const UNREACHABLE: [(&str, &[&str]); 2] = [
    (
        "boxlite-shim-v2",
        &[
            "boxlite-runtime",
            "rusqlite",
            "libsqlite3-sys",
            "reqwest",
            "rustls",
        ],
    ),
    (
        "boxlite-guest",
        &["libsqlite3-sys", "reqwest", "rustls", "containerd-shim"],
    ),
];

/// Dependency tables of a crate's manifest.
fn dependencies(name: &str) -> Option<Vec<toml::Table>> {
    let text = fs::read_to_string(root().join(name).join("Cargo.toml")).ok()?;
    let manifest: toml::Table = text.parse().expect("invalid manifest");
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let tables = kinds
        .iter()
        .filter_map(|kind| manifest.get(*kind)?.as_table().cloned());
    Some(tables.collect())
}

#[test]
fn crates_depend_only_on_allowed_crates() {
    let mut mistakes = Vec::new();
    for (name, allowed) in WORKSPACE {
        let tables = dependencies(name).expect("no manifest");
        for (dependency, settings) in tables.iter().flatten() {
            if dependency.starts_with("boxlite-") {
                let features: BTreeSet<_> = settings
                    .get("features")
                    .and_then(|f| f.as_array())
                    .into_iter()
                    .flatten()
                    .filter_map(|f| f.as_str())
                    .collect();
                match allowed.iter().find(|(other, _)| other == dependency) {
                    None => mistakes.push(format!("{name} depends on {dependency}")),
                    Some((_, may)) if !features.iter().all(|f| may.contains(f)) => {
                        mistakes.push(format!(
                            "{name} enables {features:?} of {dependency}, allowed are {may:?}"
                        ));
                    }
                    Some(_) => {}
                }
            }
            let owner = EXCLUSIVE.iter().find(|(other, _)| other == dependency);
            if let Some((_, owner)) = owner.filter(|(_, owner)| *owner != name) {
                mistakes.push(format!("{name} depends on {dependency}, only {owner} may"));
            }
        }
    }
    fail(&mistakes);
}

#[test]
fn test_features_are_enabled_only_by_dev_dependencies() {
    let mut found = 0;
    for (name, _) in WORKSPACE {
        let text = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("no manifest");
        let mut section = "";
        for line in text.lines() {
            match line.starts_with('[') {
                true => section = line,
                false if line.starts_with("default") => {
                    assert!(
                        !TEST_FEATURES.iter().any(|f| line.contains(f)),
                        "{name}: {line}"
                    );
                }
                false if line.starts_with("boxlite-runtime") => {
                    let enables = TEST_FEATURES.iter().any(|feature| line.contains(feature));
                    assert!(
                        !enables || section == "[dev-dependencies]",
                        "{name}: {line}"
                    );
                    found += usize::from(enables);
                }
                false => {}
            }
        }
    }
    assert!(found > 0, "the rule matches nothing");
}

#[test]
fn cri_types_are_named_only_in_cri_server() {
    let mut mistakes = Vec::new();
    for (path, text) in sources() {
        let outside = !path.starts_with("cri-server/")
            && !path.starts_with("proto/")
            && !path.starts_with("e2e/");
        if outside && text.contains(concat!("cri::", "v1")) {
            mistakes.push(format!("{path} names CRI types; only cri-server may"));
        }
    }
    fail(&mistakes);
}

#[test]
fn heavy_crates_are_unreachable_from_shim_and_guest() {
    let text = fs::read_to_string(root().join("Cargo.lock")).expect("no Cargo.lock");
    let lock: toml::Table = text.parse().expect("invalid Cargo.lock");
    // Versions of one name are merged: that can only make the check stricter.
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in lock["package"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("a name").to_owned();
        let dependencies = package.get("dependencies").and_then(|d| d.as_array());
        let names = dependencies
            .into_iter()
            .flatten()
            .filter_map(|d| d.as_str()?.split(' ').next())
            .map(str::to_owned);
        edges.entry(name).or_default().extend(names);
    }
    let mut mistakes = Vec::new();
    for (from, banned) in UNREACHABLE {
        let mut parents = BTreeMap::from([(from.to_owned(), String::new())]);
        let mut queue = vec![from.to_owned()];
        while let Some(name) = queue.pop() {
            for next in edges.get(&name).into_iter().flatten() {
                if !parents.contains_key(next) {
                    parents.insert(next.clone(), name.clone());
                    queue.push(next.clone());
                }
            }
        }
        for target in banned.iter().filter(|b| parents.contains_key(**b)) {
            let path = std::iter::successors(Some((*target).to_owned()), |n| {
                parents.get(n).filter(|p| !p.is_empty()).cloned()
            });
            let path: Vec<_> = path.collect();
            mistakes.push(format!("{from} depends on {}", path.join(" ◄ ")));
        }
    }
    fail(&mistakes);
}
