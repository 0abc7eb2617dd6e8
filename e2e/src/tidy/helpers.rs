//! Code that must exist once: builders of paths (invariant 5 of ARCHITECTURE.md) and the helpers of `sys`.

use super::{code, fail, sources};
use regex::Regex;
use std::collections::BTreeSet;

/// Files of runtime and cri-server that join literal names to directories.
const LAYOUTS: [&str; 5] = [
    "cri-server/src/layout.rs",
    "runtime/src/filesystem_layout.rs",
    // The registry's configuration directory belongs to the operator.
    "runtime/src/images/registry/hosts.rs",
    "runtime/src/images/store/disk.rs",
    "runtime/src/images/store/mod.rs",
];

/// Code by pattern, with the files that may contain it.
const ONCE: [(&str, &str, &[&str]); 5] = [
    (
        "recovery from a poisoned lock",
        r"PoisonError",
        &["sys/src/sync.rs"],
    ),
    (
        "a walk along the causes of an error",
        r"\w+\.source\(\);|\|&\w+\| \w+\.source\(\)",
        &["sys/src/report.rs"],
    ),
    (
        "the test for a full disk",
        "StorageFull",
        &["sys/src/storage_full.rs"],
    ),
    (
        "the limit of a socket's path",
        "MAX_SOCKET_PATH_BYTES: usize",
        &["sys/src/unix_socket.rs"],
    ),
    (
        "ID-mapped mounts",
        r"syscall\(\s*libc::SYS_mount_setattr",
        &["sys/src/mount_attributes.rs"],
    ),
];

/// Files of the crates without tests.
fn product() -> impl Iterator<Item = (String, String)> {
    let is_test = |path: &str| {
        path.starts_with("e2e/")
            || path.contains("fake_shim")
            || path
                .split('/')
                .any(|part| matches!(part, "tests" | "tests.rs"))
    };
    sources()
        .into_iter()
        .filter(move |(path, _)| !is_test(path))
        .map(|(path, text)| (path, code(&text)))
}

#[test]
fn paths_are_built_by_layouts() {
    let join = Regex::new(r#"\.join\("[\w./-]*[A-Za-z][\w./-]*"\)"#).expect("a valid pattern");
    let found: BTreeSet<_> = product()
        .filter(|(path, _)| path.starts_with("runtime/src/") || path.starts_with("cri-server/src/"))
        .filter(|(_, code)| join.is_match(code))
        .map(|(path, _)| path)
        .collect();
    let listed: BTreeSet<_> = LAYOUTS.iter().map(|path| (*path).to_owned()).collect();
    assert_eq!(
        found, listed,
        "files with path names (left) and LAYOUTS (right)"
    );
}

#[test]
fn shared_helpers_exist_once() {
    let mut mistakes = Vec::new();
    for (name, pattern, files) in ONCE {
        let pattern = Regex::new(pattern).expect("a valid pattern");
        let found: Vec<_> = product()
            .filter(|(_, code)| pattern.is_match(code))
            .map(|(path, _)| path)
            .collect();
        if found != files {
            mistakes.push(format!("{name} is in {found:?}, expected {files:?}"));
        }
    }
    fail(&mistakes);
}
