//! `make conformance-cluster`: Kubernetes' own test suite, e2e.test, run by ginkgo against the cluster.
//!
//! Evaluates nothing itself: counts and failures come from the suite's JUnit report.

use super::Cluster;
use crate::bail;
use crate::conformance::run_suite;
use crate::failure::{During, Result};
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// Specs that the suite itself excludes from a NodeConformance run.
const SKIP: &str = r"\[Slow\]|\[Serial\]|\[Disruptive\]|\[Flaky\]|Alpha|\[Feature:";

/// Options of `boxlite-e2e cluster conformance`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Run only the specs whose name matches this regular expression.
    #[arg(long, default_value = r"\[NodeConformance\]")]
    focus: String,
    /// Skip the specs whose name matches this regular expression.
    #[arg(long, default_value = SKIP)]
    skip: String,
    /// Parallel processes of ginkgo.
    #[arg(long, default_value_t = 4)]
    procs: u8,
    /// Limit of the whole run, as Go writes durations.
    #[arg(long, default_value = "3h")]
    timeout: String,
    /// Directory for the suite's output, its report and the logs of runtime and kubelet.
    #[arg(long)]
    out: PathBuf,
}

/// Runs the suite. Returns true if specs ran and none failed.
pub(crate) async fn run(cluster: &Cluster, options: &Options) -> Result<bool> {
    let [ginkgo, suite] = ["ginkgo", "e2e.test"].map(|name| cluster.programs.program(name));
    for path in [&ginkgo, &suite] {
        if !path.exists() {
            bail!(
                "{} not found: run e2e/scripts/cluster-build suite",
                path.display()
            );
        }
    }
    std::fs::create_dir_all(&options.out).during(options.out.display())?;
    let report = options.out.join("e2e-kubernetes.xml");
    let _ = std::fs::remove_file(&report);
    let output = options.out.join("e2e-kubernetes.log");
    let kubectl = &cluster.plane.kubectl;
    let mut command = Command::new(ginkgo);
    command
        .arg(format!("--procs={}", options.procs))
        .arg(format!("--timeout={}", options.timeout))
        .arg(format!("--focus={}", options.focus))
        .arg(format!("--skip={}", options.skip))
        .args(["--no-color", "--silence-skips"])
        .arg(format!("--output-dir={}", options.out.display()))
        .arg("--junit-report=e2e-kubernetes.xml")
        .arg(suite)
        .args([
            "--",
            "--provider=skeleton",
            "--disable-log-dump",
            "--dump-logs-on-failure=false",
        ])
        .arg(format!("--kubeconfig={}", kubectl.kubeconfig.display()))
        .arg(format!("--kubectl-path={}", kubectl.program.display()))
        .env("KUBECONFIG", &kubectl.kubeconfig);
    let ended = run_suite("ginkgo", &mut command, &output, &report).await;
    for name in ["n/daemon.log", "kubelet.log"] {
        let from = cluster.dir.join(name);
        let to = options
            .out
            .join(Path::new(name).file_name().unwrap_or_default());
        std::fs::copy(&from, &to).during(from.display())?;
    }
    ended?;
    let counts = Counts::read(&std::fs::read_to_string(&report)?);
    for name in &counts.failures {
        println!("FAIL  {name}");
    }
    println!(
        "e2e kubernetes: {} passed, {} failed, {} skipped",
        counts.passed,
        counts.failures.len(),
        counts.skipped
    );
    Ok(counts.failures.is_empty() && counts.passed > 0)
}

/// Counts of a JUnit report of ginkgo.
#[derive(Debug, PartialEq, Eq, Default)]
struct Counts {
    passed: usize,
    skipped: usize,
    failures: Vec<String>,
}

impl Counts {
    /// Reads the status attribute of every test case. Set-up and tear-down nodes count only if they failed.
    fn read(report: &str) -> Self {
        let mut counts = Self::default();
        for case in report.split("<testcase ").skip(1) {
            let attributes = case.split('>').next().unwrap_or_default();
            let value = |name: &str| {
                let (_, rest) = attributes.split_once(&format!("{name}=\""))?;
                Some(rest.split('"').next().unwrap_or_default())
            };
            let name = value("name").unwrap_or_default();
            match value("status").unwrap_or_default() {
                "passed" if name.starts_with("[It]") => counts.passed += 1,
                "passed" => {}
                "skipped" | "pending" => counts.skipped += 1,
                _ => counts.failures.push(name.to_owned()),
            }
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::Counts;

    #[test]
    fn report_with_every_status_is_counted() {
        let report = r#"<testsuite>
            <testcase name="[It] a [NodeConformance]" status="passed" time="1"></testcase>
            <testcase name="[It] b" status="failed"><failure message="x > y"></failure></testcase>
            <testcase name="[It] c" status="skipped"></testcase>
            <testcase name="[It] d" status="timedout"></testcase>
            <testcase name="[SynchronizedBeforeSuite]" status="passed"></testcase></testsuite>"#;
        let expected = Counts {
            passed: 1,
            skipped: 1,
            failures: vec!["[It] b".into(), "[It] d".into()],
        };
        assert_eq!(Counts::read(report), expected);
    }
}
