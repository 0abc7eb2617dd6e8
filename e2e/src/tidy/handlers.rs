//! Handlers of CRI calls: invariant 1 of ARCHITECTURE.md.

use super::{code, fail, sources};
use regex::Regex;
use std::collections::{BTreeMap, BTreeSet};

const SERVICE: &str = "cri-server/src/service/";

/// Files that implement the two gRPC traits by calling a handler for each call.
const DISPATCHERS: [&str; 2] = ["image", "runtime"];

/// Files of the folder that handlers share.
const SHARED: [&str; 7] = [
    "capacity",
    "error",
    "mod",
    "nri_hooks",
    "pod_files",
    "single_flight",
    "streams",
];

/// Handlers that use another one, because the CRI defines one call by the other.
const USES: [(&str, &str); 5] = [
    ("container_stats", "container_list"),
    ("runtime_status", "unimplemented"),
    ("sandbox_remove", "sandbox_stop"),
    ("sandbox_stats", "container_stats"),
    ("sandbox_stats", "sandbox_list"),
];

/// Methods of the runtime that change a pod, a container or an image, by handler. Handlers that are not listed change
/// nothing.
const CHANGES: [(&str, &[&str]); 13] = [
    ("container_create", &["create_container"]),
    ("container_log", &["reopen_log"]),
    // Stopped first, so that NRI plugins get both events.
    ("container_remove", &["remove_container", "stop_container"]),
    ("container_start", &["start_container"]),
    ("container_stop", &["stop_container"]),
    ("container_update", &["update_container"]),
    ("exec_sync", &["exec_sync"]),
    ("image_pull", &["pull"]),
    ("image_remove", &["remove"]),
    ("sandbox_remove", &["remove"]),
    // `remove` undoes a pod that could not be created.
    ("sandbox_run", &["create_box", "remove", "start"]),
    ("sandbox_stop", &["stop"]),
    ("sandbox_update", &["update_limits"]),
];

/// Name and code of each file of the folder; a subfolder counts as one file.
fn files() -> BTreeMap<String, String> {
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    for (path, text) in sources() {
        let Some(file) = path.strip_prefix(SERVICE) else {
            continue;
        };
        let name = file.split('/').next().unwrap_or_default();
        let name = name.trim_end_matches(".rs");
        if name != "tests" {
            files
                .entry(name.to_owned())
                .or_default()
                .push_str(&code(&text));
        }
    }
    files
}

/// Files of the folder that `code` names.
fn named<'a>(code: &str, files: &'a BTreeMap<String, String>, own: &str) -> BTreeSet<&'a str> {
    let word = |name: &str| Regex::new(&format!(r"\b{name}(::|,|\}})")).expect("a valid pattern");
    let uses: String = code
        .split_inclusive(';')
        .filter(|statement| statement.trim_start().starts_with("use super::"))
        .collect();
    files
        .keys()
        .map(String::as_str)
        .filter(|name| *name != own && *name != "mod")
        .filter(|name| {
            let qualified = Regex::new(&format!(r"super::{name}::")).expect("a valid pattern");
            word(name).is_match(&uses) || qualified.is_match(code)
        })
        .collect()
}

#[test]
fn every_call_has_one_handler() {
    let files = files();
    let handlers: Vec<&str> = files
        .keys()
        .map(String::as_str)
        .filter(|name| !DISPATCHERS.contains(name) && !SHARED.contains(name))
        .collect();
    let (mut mistakes, mut called) = (Vec::new(), BTreeSet::new());
    for dispatcher in DISPATCHERS {
        for method in files[dispatcher].split("    async fn ").skip(1) {
            let name = method.split('(').next().unwrap_or_default();
            let body = method.split_once('{').map_or("", |(_, body)| body);
            let calls: Vec<_> = handlers
                .iter()
                .filter(|handler| {
                    let call =
                        Regex::new(&format!(r"\b{handler}::\w+\(")).expect("a valid pattern");
                    call.is_match(body)
                })
                .collect();
            if calls.len() != 1 {
                mistakes.push(format!("{dispatcher}.rs: {name} calls {calls:?}"));
            }
            called.extend(calls.into_iter().copied());
        }
    }
    let unused = handlers
        .iter()
        .filter(|handler| !called.contains(**handler));
    mistakes.extend(unused.map(|handler| format!("{handler}.rs handles no call")));
    let mut uses = Vec::new();
    for handler in &handlers {
        let named = named(&files[*handler], &files, handler);
        let others = named.into_iter().filter(|name| handlers.contains(name));
        uses.extend(others.map(|other| (*handler, other)));
    }
    fail(&mistakes);
    assert_eq!(
        uses, USES,
        "uses between handlers (left) and the list (right)"
    );
}

#[test]
fn handlers_change_state_by_listed_methods() {
    let change = Regex::new(
        r"\b(?:pod|images|images\(\)|runtime)\s*\.(create_\w+|start\w*|stop\w*|remove\w*|update_\w+|reopen_log|exec\w*|pull|load|kill\w*)\(",
    )
    .expect("a valid pattern");
    let mut found = Vec::new();
    for (name, code) in files() {
        if SHARED.contains(&name.as_str()) || DISPATCHERS.contains(&name.as_str()) {
            continue;
        }
        let methods: BTreeSet<_> = change
            .captures_iter(&code)
            .filter_map(|c| c.get(1).map(|m| m.as_str().to_owned()))
            .collect();
        if !methods.is_empty() {
            found.push((name, methods.into_iter().collect::<Vec<_>>()));
        }
    }
    let listed: Vec<_> = CHANGES
        .iter()
        .map(|(name, methods)| {
            let methods = methods.iter().map(|m| (*m).to_owned());
            ((*name).to_owned(), methods.collect::<Vec<_>>())
        })
        .collect();
    assert_eq!(found, listed, "code (left) and CHANGES (right)");
}
