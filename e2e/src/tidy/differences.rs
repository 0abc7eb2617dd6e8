//! The tables of differences and of Kubernetes' features in docs: each row names existing tests that hold it.
//!
//! A name is an end-to-end case (`module::case`) of the suite or of the cluster, a test of containerd's suite that
//! `e2e/containerd-suite/tests.txt` runs (`TestName`), or a unit test of the workspace (`name`). Whether a test covers its row
//! is for the reader to judge.

use super::{fail, root, sources};
use crate::cases;
use crate::containerd_suite::list::List;
use std::collections::BTreeSet;
use std::fs;

/// Documents with such a table, and the table's heading.
const TABLES: [(&str, &str); 4] = [
    ("docs/conformance.md", "## Differences from containerd"),
    ("docs/volumes.md", "## Differences from runc"),
    ("docs/kubernetes.md", "## Fields"),
    ("docs/kubernetes.md", "## Actions"),
];
const SUITE: &str = "e2e/containerd-suite/tests.txt";

/// Names of all tests that a row may name.
struct Known {
    cases: BTreeSet<&'static str>,
    suite: BTreeSet<String>,
    unit: BTreeSet<String>,
}

impl Known {
    fn read() -> Self {
        let suite = fs::read_to_string(root().join(SUITE)).expect(SUITE);
        let sources = sources();
        let unit = sources.iter().flat_map(|(_, text)| unit_tests(text));
        Self {
            cases: cases::all()
                .iter()
                .map(|case| case.name())
                .chain(crate::cluster::case_names())
                .collect(),
            suite: List::parse(&suite).expect(SUITE).run,
            unit: unit.collect(),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.cases.contains(name) || self.suite.contains(name) || self.unit.contains(name)
    }
}

/// Returns the names of the functions behind a `#[test]` or `#[tokio::test]`.
fn unit_tests(text: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if !line.starts_with("#[test]") && !line.starts_with("#[tokio::test") {
            continue;
        }
        let function = lines.find_map(|line| {
            let line = line.strip_prefix("async ").unwrap_or(line);
            line.strip_prefix("fn ")
        });
        let name = function.and_then(|rest| rest.split('(').next());
        names.extend(name.map(str::to_owned));
    }
    names
}

/// Returns the first and the last cell of each row of the table below `heading`.
fn rows<'a>(text: &'a str, heading: &str) -> Vec<(&'a str, &'a str)> {
    let below = text.split(heading).nth(1).unwrap_or_default();
    let section = below.split("\n## ").next().unwrap_or_default();
    let lines = section.lines().filter(|line| line.starts_with('|'));
    // The header and the rule below it are no rows.
    let rows = lines.skip(2).filter_map(|line| {
        let line = line.trim_matches('|');
        let (first, rest) = line.split_once('|')?;
        Some((first.trim(), rest.rsplit('|').next()?.trim()))
    });
    rows.collect()
}

/// Returns the names in backticks.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Returns the mistakes of a table, given what tests exist.
fn mistakes(path: &str, text: &str, heading: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let rows = rows(text, heading);
    if rows.is_empty() {
        return vec![format!("{path}: no table below {heading:?}")];
    }
    let mut mistakes = Vec::new();
    for (request, cell) in rows {
        let names = names(cell);
        if names.is_empty() {
            mistakes.push(format!("{path}: the row {request:?} names no test"));
        }
        let unknown = names.into_iter().filter(|name| !exists(name));
        mistakes.extend(unknown.map(|name| {
            format!("{path}: the row {request:?} names {name:?}, which is not a test")
        }));
    }
    mistakes
}

#[test]
fn rows_of_differences_name_existing_tests() {
    let known = Known::read();
    let mut found = Vec::new();
    for (path, heading) in TABLES {
        let text = fs::read_to_string(root().join(path)).expect(path);
        found.extend(mistakes(path, &text, heading, |name| known.contains(name)));
    }
    fail(&found);
}

#[test]
fn differing_tests_of_the_suite_are_in_the_table() {
    let (path, heading) = TABLES[0];
    let text = fs::read_to_string(root().join(path)).expect(path);
    let table = rows(&text, heading);
    let named: BTreeSet<&str> = table.iter().flat_map(|(_, cell)| names(cell)).collect();
    let suite = fs::read_to_string(root().join(SUITE)).expect(SUITE);
    let differs = List::parse(&suite).expect(SUITE).differs;
    let tests = differs
        .keys()
        .map(|name| name.split('/').next().unwrap_or(name));
    let missing: Vec<_> = tests
        .filter(|test| !named.contains(test))
        .map(|test| format!("{path}: no row names {test}, which differs by {SUITE}"))
        .collect();
    fail(&missing);
}

#[test]
fn rows_without_existing_tests_are_reported() {
    let table = |cell: &str| {
        format!("# A\n\n## H\n\n| a | b |\n|---|---|\n| one | x | {cell} |\n\n## I\n\n| q |\n")
    };
    let check = |cell: &str| mistakes("p", &table(cell), "## H", |name| name == "good::case").len();
    assert_eq!(check("`good::case`"), 0);
    assert_eq!(check("`good::case`, `bad::case`"), 1);
    assert_eq!(check("none yet"), 1);
    assert_eq!(mistakes("p", "# A", "## H", |_| true).len(), 1);
    let source =
        "#[test]\nfn one() {}\n#[tokio::test(flavor = \"x\")]\nasync fn two() {}\nfn three() {}";
    assert_eq!(unit_tests(source), ["one", "two"]);
}
