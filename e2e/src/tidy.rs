//! The tidy check: fails when crate boundaries, file and function sizes, headers, unsafe code or documentation drift.
//!
//! Reads the repository's text only. Counts lines as rustfmt leaves them, so it needs no parser.

mod crates;
mod cycles;
mod differences;
mod handlers;
mod helpers;
mod language;
mod messages;
mod tasks;
mod vocabulary;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of the longest file, of the 95th percentile, of the longest function.
const MAX_FILE_LINES: usize = 800;
const P95_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 100;

/// Files that may have unsafe code; each block has its `// SAFETY:`.
const UNSAFE: &[&str] = &[
    "e2e/src/attack/memory.rs",
    "e2e/src/mapped_file.rs",
    "guest/src/boot/memory.rs",
    "guest/src/cgroup/bpf.rs",
    "guest/src/container/mod.rs",
    "guest/src/descriptor.rs",
    "guest/src/seccomp/install.rs",
    "guest/src/spawner/clone.rs",
    "guest/src/spawner/exec.rs",
    "guest/src/spawner/executable.rs",
    "guest/src/spawner/pause.rs",
    "guest/src/storage/loops.rs",
    "guest/src/system.rs",
    "shim-v2/src/jail/user_namespace.rs",
    "shim-v2/src/net/tap.rs",
    "shim-v2/src/vmm/krun/entrypoint.rs",
    "shim-v2/src/vmm/krun/ffi.rs",
    "shim-v2/src/vmm/krunfw.rs",
    "shim-v2/src/vmm/qemu/resources.rs",
    "sys/src/descriptors.rs",
    "sys/src/mount_attributes.rs",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_owned()
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir)
        .expect("a directory of the repository")
        .flatten()
    {
        let name = entry.file_name();
        let path = entry.path();
        let skipped = name.to_string_lossy().starts_with("target") || name == ".git";
        if path.is_dir() && !path.is_symlink() && !skipped {
            walk(&path, found);
        } else if path.is_file() && name != ".git" {
            found.push(path);
        }
    }
}

/// Path relative to the root, and content, of every text file.
fn texts() -> Vec<(String, String)> {
    let root = root();
    let mut paths = Vec::new();
    walk(&root, &mut paths);
    let relative = |p: &Path| {
        p.strip_prefix(&root)
            .expect("below the root")
            .display()
            .to_string()
    };
    let mut texts: Vec<_> = paths
        .iter()
        .filter_map(|p| Some((relative(p), fs::read_to_string(p).ok()?)))
        .collect();
    texts.sort();
    texts
}

fn sources() -> Vec<(String, String)> {
    texts()
        .into_iter()
        .filter(|(path, _)| path.ends_with(".rs"))
        .collect()
}

/// The code of a file without comments and without its inline tests.
fn code(text: &str) -> String {
    let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
    let lines = text[..end].lines();
    let code = lines.map(|line| line.split("//").next().unwrap_or_default());
    code.collect::<Vec<_>>().join("\n")
}

fn fail(mistakes: &[String]) {
    assert!(mistakes.is_empty(), "\n{}\n", mistakes.join("\n"));
}

#[test]
fn files_and_functions_are_short() {
    let mut mistakes = Vec::new();
    let mut sizes = Vec::new();
    for (path, text) in sources() {
        let lines: Vec<_> = text.lines().collect();
        sizes.push(lines.len());
        if lines.len() > MAX_FILE_LINES {
            mistakes.push(format!(
                "{path}: {} lines, at most {MAX_FILE_LINES}",
                lines.len()
            ));
        }
        for (at, line) in lines.iter().enumerate().filter(|(_, l)| begins_function(l)) {
            let indent = &line[..line.len() - line.trim_start().len()];
            let closing = format!("{indent}}}");
            let length = lines[at..].iter().position(|l| {
                **l == closing || l.ends_with(';') && l.starts_with(indent) && begins_function(l)
            });
            if let Some(length) = length.filter(|n| *n >= MAX_FUNCTION_LINES) {
                mistakes.push(format!(
                    "{path}:{}: a function of {} lines, at most {MAX_FUNCTION_LINES}",
                    at + 1,
                    length + 1
                ));
            }
        }
    }
    sizes.sort_unstable();
    let p95 = sizes[sizes.len() * 95 / 100];
    if p95 > P95_FILE_LINES {
        mistakes.push(format!(
            "the 95th percentile of file lengths is {p95}, at most {P95_FILE_LINES}"
        ));
    }
    fail(&mistakes);
}

fn begins_function(line: &str) -> bool {
    let words = line.trim_start().split(' ');
    for word in words {
        match word {
            "fn" => return line.ends_with('{') || line.ends_with('('),
            "async" | "const" | "unsafe" | "extern" | "\"C\"" => {}
            _ if word.starts_with("pub") => {}
            _ => return false,
        }
    }
    false
}

#[test]
fn every_source_has_a_header_and_no_blanket_permission() {
    let mut mistakes = Vec::new();
    let ignored = concat!("#[ig", "nore");
    for (path, text) in sources() {
        if !text.starts_with("//! ") {
            mistakes.push(format!("{path}: does not begin with a //! header"));
        }
        for (at, line) in text.lines().enumerate() {
            let line = line.trim_start();
            if line.starts_with(ignored) {
                mistakes.push(format!("{path}:{}: a test that is not run", at + 1));
            }
            // `make test` enables the feature.
            let conditional = line.starts_with("#[cfg_attr(") && line.contains("ignore");
            if conditional && !line.contains(r#"not(feature = "root-tests")"#) {
                mistakes.push(format!("{path}:{}: a test that is not run", at + 1));
            }
            if line.starts_with(concat!("#![al", "low")) {
                mistakes.push(format!(
                    "{path}:{}: a permission for a whole module",
                    at + 1
                ));
            }
        }
    }
    fail(&mistakes);
}

#[test]
fn unsafe_code_is_in_the_listed_files_and_explained() {
    let mut mistakes = Vec::new();
    let mut with = BTreeSet::new();
    for (path, text) in sources() {
        let lines: Vec<_> = text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let unsafe_here = [
                concat!("unsa", "fe {"),
                concat!("unsa", "fe impl"),
                concat!("unsa", "fe fn"),
                concat!("unsa", "fe extern"),
            ]
            .iter()
            .any(|form| code.contains(form) && !code.contains('"'));
            if !unsafe_here {
                continue;
            }
            with.insert(path.clone());
            let near = &lines[at.saturating_sub(8)..=at];
            if !near
                .iter()
                .any(|l| l.contains("SAFETY:") || l.contains("# Safety"))
            {
                mistakes.push(format!("{path}:{}: unsafe without SAFETY", at + 1));
            }
        }
    }
    let listed: BTreeSet<_> = UNSAFE.iter().map(|p| (*p).to_owned()).collect();
    for path in with.difference(&listed) {
        mistakes.push(format!(
            "{path}: unsafe code in a file that is not on the list in tidy.rs"
        ));
    }
    for path in listed.difference(&with) {
        mistakes.push(format!(
            "{path}: on the list in tidy.rs, without unsafe code"
        ));
    }
    fail(&mistakes);
}

#[test]
fn no_file_knows_the_machine_it_was_written_on() {
    let banned = [
        concat!("/wo", "rk/"),
        concat!("/root/", "."),
        concat!("deb.", "debian"),
        concat!("crates", ".io"),
    ];
    let mut mistakes = Vec::new();
    for (path, text) in texts() {
        if path == "Cargo.lock" {
            continue;
        }
        for word in banned.iter().filter(|w| text.contains(**w)) {
            mistakes.push(format!("{path}: holds {word:?}"));
        }
    }
    fail(&mistakes);
}

/// Names in `backticks` of the first column of the table below a heading.
fn table(text: &str, heading: &str) -> BTreeSet<String> {
    let below = text.split(heading).nth(1).expect("the heading");
    let section = below.split("\n## ").next().unwrap_or_default();
    let first = section.lines().filter(|l| l.starts_with("| `"));
    first
        .filter_map(|l| l.split('`').nth(1))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_table_of_unimplemented_calls_is_true() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let code = fs::read_to_string(root().join("cri-server/src/service/unimplemented.rs"))
        .expect("unimplemented.rs");
    let documented = table(&text, "## Calls that answer UNIMPLEMENTED");
    let quoted = code.split('"').skip(1).step_by(2);
    let name = |w: &&str| {
        w.starts_with(|c: char| c.is_ascii_uppercase())
            && w.chars().all(|c| c.is_ascii_alphanumeric())
    };
    let real: BTreeSet<_> = quoted.filter(name).map(str::to_owned).collect();
    assert!(!real.is_empty(), "unimplemented.rs names no call in quotes");
    assert_eq!(
        documented, real,
        "ARCHITECTURE.md (left) and unimplemented.rs (right)"
    );
}
