//! `make conformance-cluster`: Kubernetes' own test suite, e2e.test, run by ginkgo against the cluster.
//!
//! Evaluates nothing itself: counts and failures come from the suite's JUnit report.

use super::Cluster;
use crate::bail;
use crate::conformance::run_suite;
use crate::failure::{During, Result};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use tokio::process::Command;

/// Specs that the suite itself excludes from a NodeConformance run.
const SKIP: &str = r"\[Slow\]|\[Serial\]|\[Disruptive\]|\[Flaky\]|Alpha|\[Feature:";

/// Bytes kept of each component's log.
const MAX_LOG_BYTES: u64 = 32 << 20;

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
    /// Directory for the suite's output, its report and the logs of all components.
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
    let kept = keep_logs(&cluster.dir, &options.out);
    let counts = match std::fs::read_to_string(&report) {
        Ok(text) => Counts::read(&text),
        Err(error) => return ended.and(Err(error.into())),
    };
    for name in &counts.failures {
        println!("FAIL  {name}");
    }
    println!(
        "e2e kubernetes: {} passed, {} failed, {} skipped",
        counts.passed,
        counts.failures.len(),
        counts.skipped
    );
    ended.and(kept)?;
    Ok(counts.failures.is_empty() && counts.passed > 0)
}

/// Copies the end of each component's log, of which the cluster's directory has one each, and of the runtime's.
fn keep_logs(dir: &Path, out: &Path) -> Result {
    let mut logs = vec![dir.join("n/daemon.log")];
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            logs.push(path);
        }
    }
    for log in logs {
        let mut file = File::open(&log).during(log.display())?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG_BYTES)))?;
        let target = out.join(log.file_name().unwrap_or_default());
        let mut copy = File::create(&target).during(target.display())?;
        std::io::copy(&mut file.take(MAX_LOG_BYTES), &mut copy).during(target.display())?;
    }
    Ok(())
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
    use super::{Counts, MAX_LOG_BYTES, keep_logs};
    use crate::failure::Result;
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn logs_of_all_components_are_kept_up_to_the_limit() -> Result {
        let [cluster, out] = [tempfile::tempdir()?, tempfile::tempdir()?];
        std::fs::create_dir(cluster.path().join("n"))?;
        std::fs::write(cluster.path().join("n/daemon.log"), "runtime")?;
        std::fs::write(cluster.path().join("kubelet.json"), "no log")?;
        let mut long = std::fs::File::create(cluster.path().join("apiserver.log"))?;
        long.seek(SeekFrom::Start(MAX_LOG_BYTES))?;
        long.write_all(b"end")?;
        keep_logs(cluster.path(), out.path())?;
        assert_eq!(std::fs::read(out.path().join("daemon.log"))?, b"runtime");
        assert!(!out.path().join("kubelet.json").exists());
        let kept = std::fs::read(out.path().join("apiserver.log"))?;
        assert_eq!(u64::try_from(kept.len())?, MAX_LOG_BYTES);
        assert!(kept.ends_with(b"end"));
        Ok(())
    }

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
