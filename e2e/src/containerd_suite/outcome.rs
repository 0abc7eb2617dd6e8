//! [`Outcome`]: result of one test of a Go test binary, from its verbose output and the excuses of the list.

use super::list::List;
use std::collections::BTreeMap;

/// Printed characters of a reason; the test's log has the full text.
const MAX_REASON_CHARS: usize = 400;

/// Result of a test or subtest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// It passed.
    Passed,
    /// It failed, or did not end.
    Failed,
    /// It skipped itself.
    Skipped,
}

/// Result of one test with its subtests.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// State of the test.
    pub state: State,
    /// Subtests without subtests that did not pass, or the test itself.
    pub leaves: BTreeMap<String, State>,
    /// First error or the reason of the skip.
    pub reason: String,
}

/// Evaluation of an outcome by the excuses.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Names that did not pass without an excuse.
    pub bad: Vec<String>,
    /// Names that did not pass, with the excuse.
    pub excused: Vec<(String, String)>,
    /// Excuses of names that passed.
    pub stale: Vec<String>,
}

impl Outcome {
    /// Reads the output of `-test.run ^<test>$ -test.v`.
    pub(crate) fn read(test: &str, output: &str) -> Self {
        let results: BTreeMap<&str, State> = output.lines().filter_map(result).collect();
        // A test without a result was ended by a panic or the time limit.
        let state = results.get(test).copied().unwrap_or(State::Failed);
        let mut leaves: BTreeMap<String, State> = BTreeMap::new();
        for (name, &state) in &results {
            let prefix = format!("{name}/");
            let has_cause = |(other, &result): (&&str, &State)| {
                other.starts_with(&prefix) && result == State::Failed
            };
            let is_cause = state == State::Skipped || !results.iter().any(has_cause);
            if state != State::Passed && is_cause {
                leaves.insert((*name).to_owned(), state);
            }
        }
        if state != State::Passed && leaves.is_empty() {
            leaves.insert(test.to_owned(), state);
        }
        Self {
            state,
            leaves,
            reason: reason(output),
        }
    }

    /// Compares the result with the excuses of this test.
    pub(crate) fn verdict(&self, test: &str, list: &List) -> Verdict {
        let mut verdict = Verdict {
            bad: Vec::new(),
            excused: Vec::new(),
            stale: Vec::new(),
        };
        for (name, state) in &self.leaves {
            let skip = list.skips.get(name).filter(|_| *state == State::Skipped);
            match list.differs.get(name).or(skip) {
                Some(reason) => verdict.excused.push((name.clone(), reason.clone())),
                None => verdict.bad.push(name.clone()),
            }
        }
        let prefix = format!("{test}/");
        let of_this = |name: &&String| name.as_str() == test || name.starts_with(&prefix);
        let passed = |name: &&String| !self.leaves.contains_key(name.as_str());
        verdict.stale = list
            .differs
            .keys()
            .filter(of_this)
            .filter(passed)
            .cloned()
            .collect();
        verdict
    }
}

/// Parses a line such as `    --- FAIL: TestA/b (0.10s)`.
fn result(line: &str) -> Option<(&str, State)> {
    let rest = line.trim_start().strip_prefix("--- ")?;
    let (state, rest) = rest.split_once(": ")?;
    let state = match state {
        "PASS" => State::Passed,
        "FAIL" => State::Failed,
        "SKIP" => State::Skipped,
        _ => return None,
    };
    let (name, _) = rest.rsplit_once(" (")?;
    Some((name, state))
}

/// Returns the first error that the output contains, on one line.
fn reason(output: &str) -> String {
    let lines: Vec<_> = output.lines().collect();
    let is_cause = |line: &&str| {
        let line = line.trim_start();
        line.starts_with("Error:") || line.starts_with("panic: ")
    };
    let at = lines.iter().position(is_cause);
    let text = match at {
        Some(at) => lines[at..lines.len().min(at + 6)].join(" "),
        None => lines
            .iter()
            .rev()
            .find(|line| line.contains("_test.go:"))
            .map_or_else(String::new, |line| (*line).to_owned()),
    };
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.chars().take(MAX_REASON_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "=== RUN   TestA\n=== RUN   TestA/b\n    a_test.go:7: \n        Error:  not equal\n--- FAIL: TestA (3.1s)\n    --- FAIL: TestA/b (0.10s)\n    --- PASS: TestA/c (0.2s)\n    --- SKIP: TestA/d (0.0s)\nFAIL\n";

    fn excuses(names: &[&str]) -> List {
        let one = |name: &&str| ((*name).to_owned(), "why".to_owned());
        List {
            differs: names.iter().map(one).collect(),
            ..List::default()
        }
    }

    #[test]
    fn outcome_with_failed_subtests_names_the_leaves() {
        let outcome = Outcome::read("TestA", OUTPUT);
        assert_eq!(outcome.state, State::Failed);
        let leaves: Vec<_> = outcome.leaves.keys().collect();
        assert_eq!(leaves, ["TestA/b", "TestA/d"]);
        assert!(outcome.reason.contains("not equal"), "{}", outcome.reason);
    }

    #[test]
    fn outcome_without_a_result_is_a_failure() {
        let outcome = Outcome::read("TestA", "=== RUN   TestA\npanic: test timed out\n");
        assert_eq!(outcome.state, State::Failed);
        assert_eq!(outcome.verdict("TestA", &excuses(&[])).bad, ["TestA"]);
        assert!(outcome.reason.starts_with("panic: "));
    }

    #[test]
    fn excuse_of_a_subtest_covers_no_other() {
        let outcome = Outcome::read("TestA", OUTPUT);
        let verdict = outcome.verdict("TestA", &excuses(&["TestA/b"]));
        assert_eq!(verdict.bad, ["TestA/d"]);
        assert_eq!(verdict.excused.len(), 1);
        assert_eq!(
            outcome.verdict("TestA", &excuses(&["TestA"])).bad.len(),
            2,
            "an excuse of the test must not cover its subtests"
        );
    }

    #[test]
    fn excuse_of_a_passed_subtest_is_stale() {
        let outcome = Outcome::read("TestA", OUTPUT);
        let differs = excuses(&["TestA/b", "TestA/c", "TestA/d", "TestAB/c"]);
        let verdict = outcome.verdict("TestA", &differs);
        assert_eq!(verdict.stale, ["TestA/c"]);
        assert!(verdict.bad.is_empty());
    }

    #[test]
    fn excuse_of_a_skip_does_not_cover_a_failure() {
        let excuse = |name: &str| List {
            skips: [(name.to_owned(), "why".to_owned())].into(),
            ..List::default()
        };
        let outcome = Outcome::read("TestA", OUTPUT);
        let verdict = outcome.verdict("TestA", &excuse("TestA/d"));
        assert_eq!(verdict.bad, ["TestA/b"]);
        let verdict = outcome.verdict("TestA", &excuse("TestA/b"));
        assert_eq!(verdict.bad, ["TestA/b", "TestA/d"]);
        let passed = outcome.verdict("TestA", &excuse("TestA/c"));
        assert!(passed.stale.is_empty());
    }
}
