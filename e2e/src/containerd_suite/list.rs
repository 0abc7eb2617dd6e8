//! [`List`]: expected outcome of each of containerd's integration tests, read from `e2e/containerd-suite/tests.txt`.
//!
//! The file names every test of the pinned module, so that a newer module with another test needs a decision.

use crate::bail;
use crate::failure::Result;
use std::collections::{BTreeMap, BTreeSet};

/// Expectations of all tests.
#[derive(Debug, Default)]
pub(crate) struct List {
    /// Tests to run.
    pub run: BTreeSet<String>,
    /// Tests of containerd itself, with the reason.
    pub own: BTreeMap<String, String>,
    /// Tests, or `Test/subtest`, that run and do not pass, with the reason.
    pub differs: BTreeMap<String, String>,
    /// Tests, or `Test/subtest`, that skip themselves on some machines, with the reason.
    pub skips: BTreeMap<String, String>,
}

impl List {
    /// Parses lines of `run <test>`, `own <test>: <reason>` and `differs|skips <test>[/<subtest>]: <reason>`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let mut list = Self::default();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let Some((kind, rest)) = line.split_once(' ') else {
                bail!("invalid line {line:?} of the list of tests: no test");
            };
            if kind == "run" {
                list.run.insert(rest.to_owned());
                continue;
            }
            let Some((name, reason)) = rest.split_once(": ") else {
                bail!("invalid line {line:?} of the list of tests: no reason");
            };
            let entries = match kind {
                "own" => &mut list.own,
                "differs" => &mut list.differs,
                "skips" => &mut list.skips,
                _ => bail!("invalid line {line:?} of the list of tests: unknown kind {kind:?}"),
            };
            entries.insert(name.to_owned(), reason.to_owned());
        }
        for name in list.differs.keys().chain(list.skips.keys()) {
            let test = name.split('/').next().unwrap_or(name);
            if !list.run.contains(test) {
                bail!("the list of tests excuses {name:?}, which it does not run");
            }
        }
        if let Some(name) = list.own.keys().find(|name| list.run.contains(*name)) {
            bail!("the list of tests both runs and omits {name:?}");
        }
        Ok(list)
    }

    /// Returns an error unless the list names exactly these tests.
    pub(crate) fn compare(&self, tests: &[String]) -> Result {
        let listed: BTreeSet<&str> = self
            .run
            .iter()
            .chain(self.own.keys())
            .map(String::as_str)
            .collect();
        let built: BTreeSet<&str> = tests.iter().map(String::as_str).collect();
        let missing: Vec<_> = built.difference(&listed).collect();
        let gone: Vec<_> = listed.difference(&built).collect();
        if !missing.is_empty() || !gone.is_empty() {
            bail!(
                "e2e/containerd-suite/tests.txt lacks {missing:?} and names {gone:?}, which the module lacks"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_of_the_tree_is_valid() {
        let list = List::parse(super::super::TESTS).unwrap();
        assert!(list.run.len() > list.differs.len());
    }

    #[test]
    fn list_with_an_unfounded_line_is_refused() {
        for text in [
            "run",
            "own TestA",
            "odd TestA: why",
            "differs TestA/x: why",
            "run TestA\nown TestA: why",
        ] {
            assert!(List::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn list_without_a_test_of_the_module_is_refused() {
        let list = List::parse("# head\n\nrun TestA\nown TestB: why").unwrap();
        let names = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        list.compare(&names("TestA TestB")).unwrap();
        assert!(list.compare(&names("TestA TestB TestC")).is_err());
        assert!(list.compare(&names("TestA")).is_err());
    }
}
