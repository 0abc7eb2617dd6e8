//! [`Report`]: evaluation of critest's JSON report.
//!
//! Specs that the suite's filter left out (benchmarks, `--focus`) are not counted. All other skips and failures are
//! printed with their reason; those in [`EXCUSED`] are accepted.

use crate::failure::{During, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// Specs that cannot run here, by a part of their name.
const EXCUSED: [(&str, &str); 2] = [
    ("AppArmor", "needs AppArmor in the host's kernel"),
    (
        "public image with digest should be pulled and removed",
        "requires the digest of an upstream image that cannot be rebuilt",
    ),
];

/// Skip reason of specs that a run did not select: the NRI specs in the two runs without NRI. They are not counted.
const NOT_SELECTED: &str = "NRI socket not configured";

/// Result of one run.
pub(crate) struct Report {
    specs: Vec<Spec>,
}

struct Spec {
    group: String,
    name: String,
    state: State,
    seconds: f64,
    reason: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Passed,
    Failed,
    Skipped,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<SpecReport>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SpecReport {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    run_time: u64,
    #[serde(default)]
    failure: Failure,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Failure {
    message: String,
    forwarded_panic: String,
    location: Location,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Location {
    file_name: String,
    line_number: u64,
}

/// Reads critest's JSON report.
pub(crate) fn read(path: &Path) -> Result<Report> {
    let suites: Vec<Suite> =
        serde_json::from_slice(&std::fs::read(path)?).during(path.display())?;
    let specs = suites
        .into_iter()
        .flat_map(|s| s.spec_reports.unwrap_or_default());
    Ok(Report {
        specs: specs.filter_map(spec).collect(),
    })
}

/// Converts an entry. Returns `None` for specs that were not selected.
fn spec(report: SpecReport) -> Option<Spec> {
    let state = match report.state.as_str() {
        "passed" => State::Passed,
        "skipped" | "pending" => State::Skipped,
        _ => State::Failed,
    };
    let is_spec = report.leaf_node_type == "It";
    let reason = &report.failure.message;
    if state == State::Skipped && (reason.is_empty() || reason.contains(NOT_SELECTED)) {
        return None;
    }
    // Suite nodes count only if they fail: then no spec ran.
    if !is_spec && state != State::Failed {
        return None;
    }
    let mut texts = report.container_hierarchy_texts.unwrap_or_default();
    texts.push(report.leaf_node_text);
    let group = texts[0].trim_start_matches("[k8s.io] ").to_owned();
    let failure = report.failure;
    let file = failure.location.file_name;
    let place = file.rsplit('/').next().unwrap_or_default();
    let mut reason = failure.message;
    if !failure.forwarded_panic.is_empty() {
        reason = format!("{reason}: {}", failure.forwarded_panic);
    }
    if state == State::Failed {
        reason = format!("{place}:{}: {reason}", failure.location.line_number);
    }
    Some(Spec {
        group,
        name: texts[1.min(texts.len() - 1)..].join(" "),
        state,
        seconds: report.run_time as f64 / 1e9,
        reason,
    })
}

impl Spec {
    fn excuse(&self) -> Option<&'static str> {
        let full = format!("{} {}", self.group, self.name);
        let found = EXCUSED.iter().find(|(part, _)| full.contains(part));
        found.map(|(_, reason)| *reason)
    }
}

impl Report {
    fn count(&self, state: State) -> usize {
        self.specs.iter().filter(|s| s.state == state).count()
    }

    /// Returns `N passed, N failed, N skipped; N of these cannot run here`.
    pub(crate) fn line(&self) -> String {
        let excused = self.specs.iter().filter(|s| s.state != State::Passed);
        format!(
            "{} passed, {} failed, {} skipped; {} of these cannot run here",
            self.count(State::Passed),
            self.count(State::Failed),
            self.count(State::Skipped),
            excused.filter(|s| s.excuse().is_some()).count()
        )
    }

    /// Returns true if a spec passed and no spec failed without excuse; with `skips_count`, also no spec was skipped
    /// without one.
    pub(crate) fn good(&self, skips_count: bool) -> bool {
        let counts = |s: &Spec| match s.state {
            State::Passed => false,
            State::Skipped => skips_count,
            State::Failed => true,
        };
        let bad = |s: &Spec| counts(s) && s.excuse().is_none();
        self.count(State::Passed) > 0 && !self.specs.iter().any(bad)
    }

    /// Returns a table by group, followed by each spec that did not pass and its reason.
    pub(crate) fn text(&self) -> String {
        let mut groups: BTreeMap<&str, ([usize; 3], f64)> = BTreeMap::new();
        for spec in &self.specs {
            let (counts, seconds) = groups.entry(&spec.group).or_default();
            counts[spec.state as usize] += 1;
            *seconds += spec.seconds;
        }
        let mut text = format!(
            "{:<40} {:>6} {:>6} {:>7} {:>8}\n",
            "group", "passed", "failed", "skipped", "seconds"
        );
        for (group, ([passed, failed, skipped], seconds)) in groups {
            text.push_str(&format!(
                "{group:<40} {passed:>6} {failed:>6} {skipped:>7} {seconds:>8.1}\n"
            ));
        }
        for spec in self.specs.iter().filter(|s| s.state != State::Passed) {
            let word = match spec.state {
                State::Skipped => "skipped",
                _ => "FAILED",
            };
            let excuse = spec.excuse().map(|e| format!(" ({e})")).unwrap_or_default();
            let reason = spec.reason.split_whitespace().collect::<Vec<_>>().join(" ");
            let reason: String = reason.chars().take(MAX_REASON_CHARS).collect();
            text.push_str(&format!(
                "{word}: {}: {}{excuse}: {reason}\n",
                spec.group, spec.name
            ));
        }
        text
    }
}

/// Printed characters of a reason; the log has the full text.
const MAX_REASON_CHARS: usize = 600;

#[cfg(test)]
mod tests {
    use super::*;

    fn report(specs: &str) -> Report {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        std::fs::write(&path, format!("[{{\"SpecReports\": [{specs}]}}]")).unwrap();
        read(&path).unwrap()
    }

    fn one(group: &str, name: &str, state: &str, message: &str) -> String {
        format!(
            "{{\"ContainerHierarchyTexts\": [\"[k8s.io] {group}\"], \"LeafNodeType\": \"It\", \"LeafNodeText\": \"{name}\", \
             \"State\": \"{state}\", \"RunTime\": 5, \"Failure\": {{\"Message\": \"{message}\"}}}}"
        )
    }

    #[test]
    fn skip_without_excuse_fails() {
        let good = report(
            &[
                one("Pod", "runs", "passed", ""),
                one("AppArmor", "x", "skipped", "off"),
            ]
            .join(","),
        );
        assert!(good.good(true));
        assert_eq!(
            good.line(),
            "1 passed, 0 failed, 1 skipped; 1 of these cannot run here"
        );
        for state in ["skipped", "failed", "panicked", "timedout", "interrupted"] {
            let bad = [
                one("Pod", "runs", "passed", ""),
                one("Pod", "more", state, "why"),
            ]
            .join(",");
            assert!(!report(&bad).good(true), "{state}");
            assert_eq!(report(&bad).good(false), state == "skipped", "{state}");
        }
    }

    #[test]
    fn filtered_specs_are_not_counted_and_an_empty_run_fails() {
        let nri = one(
            "NRI",
            "x",
            "skipped",
            "NRI socket not configured (use -nri-socket flag)",
        );
        let empty = report(&[one("Benchmark", "x", "skipped", ""), nri].join(","));
        assert_eq!(
            empty.line(),
            "0 passed, 0 failed, 0 skipped; 0 of these cannot run here"
        );
        assert!(!empty.good(true) && !empty.good(false));
    }
}
