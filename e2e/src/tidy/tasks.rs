//! Owners of tasks and threads in the programs: invariant 6 of ARCHITECTURE.md. Tests and test doubles may detach.
//!
//! Text based: looks at the calls that start tasks, in code formatted by rustfmt.

use super::{code, fail, sources};
use regex::Regex;
use std::collections::{BTreeMap, BTreeSet};

/// Crates whose code runs in one of the programs.
const PROGRAMS: [&str; 10] = [
    "config",
    "cri-server",
    "erofs",
    "guest",
    "installer",
    "portal",
    "runtime",
    "shim-v2",
    "sys",
    "telemetry",
];

/// Files that create a task tracker, and who waits for it with a limit.
const TRACKERS: [(&str, &str); 7] = [
    ("cri-server/src/nri/mod.rs", "Nri::stop"),
    ("cri-server/src/service/mod.rs", "serve::run"),
    ("cri-server/src/streaming/http.rs", "serve::run"),
    ("guest/src/container/launcher.rs", "serve::serve"),
    // Counts the threads of a pull. Each ends within one chunk of it; the program waits for blocking threads, with a limit.
    (
        "runtime/src/images/layer/mod.rs",
        "LayerJobs::wait_idle, cli::block_on",
    ),
    ("runtime/src/runtime.rs", "BoxliteRuntime::shutdown"),
    ("shim-v2/src/daemon.rs", "daemon::run"),
];

/// Files with blocking jobs without a waiter. The comment at each call has the reason.
const DETACHED_JOBS: [&str; 3] = [
    "cri-server/src/service/container_create.rs",
    "cri-server/src/service/mod.rs",
    "guest/src/container/create.rs",
];

/// Number of threads that a file starts and does not join, and the event that ends them.
const THREADS: [(&str, usize, &str); 9] = [
    (
        "guest/src/mount_export/server.rs",
        1,
        "the end of the host's stream",
    ),
    (
        "guest/src/mount_export/watcher.rs",
        1,
        "its only system call",
    ),
    (
        "runtime/src/images/store/checksums.rs",
        1,
        "the end of its queue; it holds neither the store nor its lock",
    ),
    ("shim-v2/src/blocks/server.rs", 1, "the drop of its Server"),
    ("shim-v2/src/cli/start.rs", 1, "the daemon's first line"),
    (
        "shim-v2/src/mount_export/host_mounter.rs",
        1,
        "its step, which it undoes after the timeout",
    ),
    (
        "shim-v2/src/mount_export/pump.rs",
        2,
        "Pump::stop and the end of the mount",
    ),
    (
        "shim-v2/src/vmm/krun/instance.rs",
        1,
        "the end of passt or of the VM",
    ),
    (
        "shim-v2/src/vmm/supervisor.rs",
        2,
        "the exit of the vmm child",
    ),
];

/// Path and code of every file of the programs.
fn programs() -> Vec<(String, String)> {
    let is_program = |path: &str| {
        let (folder, file) = path.split_once("/src/").unwrap_or_default();
        PROGRAMS.contains(&folder)
            && !file.starts_with("bin/")
            && !file.contains("fake_shim")
            && !file
                .split('/')
                .any(|part| matches!(part, "tests" | "tests.rs"))
    };
    sources()
        .into_iter()
        .filter(|(path, _)| is_program(path))
        .map(|(path, text)| (path, code(&text)))
        .collect()
}

/// Text behind the bracket that closes the one at the beginning of `text`.
fn behind_call(text: &str) -> &str {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &text[at + 1..];
        }
    }
    ""
}

/// Calls of `spawn_blocking` in `code` whose result is discarded.
fn detached_jobs(code: &str) -> usize {
    let call = "spawn_blocking";
    let discarded = |at: usize| {
        let statement = code[..at].rsplit(['\n', ';', '{', '}']).next();
        let before = statement.unwrap_or_default().trim();
        let before = before
            .trim_end_matches("task::")
            .trim_end_matches("tokio::");
        let is_statement = matches!(before, "" | "drop(" | "let _ = ");
        let after = behind_call(&code[at + call.len()..]).trim_start();
        is_statement && (after.starts_with(';') || after.starts_with(')'))
    };
    code.match_indices(call)
        .filter(|(at, _)| discarded(*at))
        .count()
}

/// Threads that `code` starts outside a scope.
fn threads(code: &str) -> usize {
    let builder = Regex::new(r"thread::Builder::new\(\)").expect("a valid pattern");
    let built = builder.find_iter(code).filter(|found| {
        let rest = &code[found.end()..];
        let scoped = rest.find(".spawn_scoped(");
        let spawned = rest.find(".spawn(");
        scoped.unwrap_or(usize::MAX) > spawned.unwrap_or(usize::MAX)
    });
    built.count() + code.matches("thread::spawn(").count()
}

#[test]
fn every_task_has_an_owner() {
    let owned = Regex::new(r"AbortOnDropHandle::new\(\s*tokio::spawn\(").expect("a valid pattern");
    let spawned =
        Regex::new(r"tokio::spawn\(|task::spawn\(|spawn_local\(|Handle::\w+\(\)\s*\.spawn")
            .expect("a valid pattern");
    let mut mistakes = Vec::new();
    let (mut trackers, mut jobs) = (BTreeSet::new(), BTreeSet::new());
    for (path, code) in programs() {
        let (all, owned) = (
            spawned.find_iter(&code).count(),
            owned.find_iter(&code).count(),
        );
        if all != owned {
            mistakes.push(format!(
                "{path}: {} tasks without an owner: use a TaskTracker, a JoinSet or AbortOnDropHandle::new(tokio::spawn(…))",
                all - owned
            ));
        }
        if code.contains("TaskTracker::new()") {
            trackers.insert(path.clone());
        }
        if detached_jobs(&code) > 0 {
            jobs.insert(path);
        }
    }
    let listed: BTreeSet<_> = TRACKERS
        .iter()
        .map(|(path, _)| (*path).to_owned())
        .collect();
    for path in trackers.symmetric_difference(&listed) {
        mistakes.push(format!("{path}: TRACKERS and the code differ"));
    }
    let listed: BTreeSet<_> = DETACHED_JOBS.iter().map(|p| (*p).to_owned()).collect();
    for path in jobs.symmetric_difference(&listed) {
        mistakes.push(format!("{path}: DETACHED_JOBS and the code differ"));
    }
    fail(&mistakes);
}

#[test]
fn every_thread_is_scoped_or_listed() {
    let found: BTreeMap<_, _> = programs()
        .into_iter()
        .map(|(path, code)| (path, threads(&code)))
        .filter(|(_, count)| *count > 0)
        .collect();
    let listed: BTreeMap<_, _> = THREADS
        .iter()
        .map(|(path, count, _)| ((*path).to_owned(), *count))
        .collect();
    assert_eq!(found, listed, "code (left) and THREADS (right)");
}

#[test]
fn detached_tasks_and_threads_are_recognized() {
    for (code, expected) in [
        ("    tokio::task::spawn_blocking(move || f(1));\n", 1),
        ("    drop(tokio::task::spawn_blocking(f));\n", 1),
        ("    let _ = tokio::task::spawn_blocking(f);\n", 1),
        ("    let task = tokio::task::spawn_blocking(f);\n", 0),
        ("    tokio::task::spawn_blocking(f)\n        .await\n", 0),
        ("    tasks.spawn_blocking(f);\n", 0),
    ] {
        assert_eq!(detached_jobs(code), expected, "{code}");
    }
    let builder = "std::thread::Builder::new()\n    .name(n)\n";
    assert_eq!(threads(&format!("{builder}    .spawn(f)")), 1);
    assert_eq!(threads(&format!("{builder}    .spawn_scoped(scope, f)")), 0);
    assert_eq!(threads("std::thread::spawn(f)"), 1);
}
