//! The test runner: runs cases by name, one after the other (two cores run one VM well), each with a time limit and a leak
//! check, and prints one line per case and a summary.
//!
//! A case that panics, exceeds its limit, fails or leaks is a failure. Cases that cannot run in the current environment are
//! printed with the reason and counted as skipped. [`TestEnv`] abstracts the environment: the [`TestContext`] of
//! boxlite-cri's suite, or the context of [`crate::containerd`].

use crate::context::{Backend, TestContext};
use crate::failure::{Failure, Result};
use crate::junit::{Outcome, Report};
use crate::leak::LeakSnapshot;
use crate::service::Service;
use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_cri::v1::PodSandboxFilter;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Lines of the shared daemon's log that are printed for a failed case.
const LOG_LINES: usize = 12;

/// Environment in which cases run.
pub(crate) trait TestEnv: Send + Sync + 'static {
    /// State recorded before a case, for the leak check.
    type Before;

    /// Returns the backend, which determines the time limits.
    fn backend(&self) -> Backend;

    /// Returns the daemon that the cases share.
    fn daemon(&self) -> &Service;

    /// Records the state before a case.
    fn before(&self) -> Result<Self::Before>;

    /// Cleans up after a case and fails if it leaked anything.
    async fn after(&self, before: Self::Before, failed: bool) -> Result;
}

/// Argument of every case of boxlite-cri's suite.
pub(crate) type Context = Arc<TestContext>;

type Run<W> = Box<dyn Fn(Arc<W>) -> BoxFuture<'static, Result> + Send + Sync>;
type Condition<W> = Box<dyn Fn(&W) -> bool + Send + Sync>;

/// A test case. Its name is that of its function, with the module in front.
pub(crate) struct Case<W = TestContext> {
    name: &'static str,
    seconds: u64,
    unless: Option<(Condition<W>, &'static str)>,
    run: Run<W>,
}

/// Defines a case from a function and its time limit in seconds on QEMU.
#[macro_export]
macro_rules! case {
    ($run:ident, $seconds:expr) => {
        $crate::runner::case_at(
            concat!(module_path!(), "::", stringify!($run)),
            $seconds,
            $run,
        )
    };
}

/// Creates a case from the full path of its function; see [`case!`](crate::case).
pub(crate) fn case_at<W, F, Fut>(path: &'static str, seconds: u64, run: F) -> Case<W>
where
    F: Fn(Arc<W>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result> + Send + 'static,
{
    // The last two components: module and function.
    let function = path.rfind("::").unwrap_or(0);
    let name = path[..function]
        .rfind("::")
        .map_or(path, |module| &path[module + 2..]);
    Case {
        name,
        seconds,
        unless: None,
        run: Box::new(move |ctx| run(ctx).boxed()),
    }
}

impl<W: TestEnv> Case<W> {
    /// Returns the name, `<module>::<function>`.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Skips the case if `condition` holds.
    pub(crate) fn unless(
        mut self,
        condition: impl Fn(&W) -> bool + Send + Sync + 'static,
        reason: &'static str,
    ) -> Self {
        self.unless = Some((Box::new(condition), reason));
        self
    }

    /// Skips the case on one backend.
    pub(crate) fn not_on(self, backend: Backend, reason: &'static str) -> Self {
        self.unless(move |ctx| ctx.backend() == backend, reason)
    }
}

/// Selection and reporting of a run.
pub(crate) struct Options<'a> {
    /// Title of the summary line.
    pub title: &'a str,
    /// Only cases whose name contains this text run.
    pub filter: &'a str,
    /// JUnit XML file to write.
    pub junit: Option<PathBuf>,
}

/// Runs the selected cases and prints a summary. Returns true if at least one ran and none failed.
pub(crate) async fn run<W: TestEnv>(
    ctx: &Arc<W>,
    options: &Options<'_>,
    cases: Vec<Case<W>>,
) -> Result<bool> {
    let begun = Instant::now();
    let mut report = Report::default();
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for case in cases.iter().filter(|c| c.name.contains(options.filter)) {
        if let Some((condition, reason)) = &case.unless
            && condition(ctx)
        {
            println!("skip  {}: {reason}", case.name);
            report.add(
                case.name,
                Duration::ZERO,
                Outcome::Skipped((*reason).into()),
            );
            skipped += 1;
            continue;
        }
        let mark = ctx.daemon().length();
        let start = Instant::now();
        let result = run_one(ctx, case).await;
        let took = start.elapsed();
        let seconds = took.as_secs_f64();
        let outcome = match result {
            Ok(()) => {
                passed += 1;
                println!("ok    {:<60} {seconds:>6.1} s", case.name);
                Outcome::Passed
            }
            Err(failure) => {
                let log = ctx.daemon().tail(mark, LOG_LINES);
                println!(
                    "FAIL  {:<60} {seconds:>6.1} s\n      {}\n      --- log of the shared daemon\n      {}",
                    case.name,
                    indent(&failure.0),
                    indent(&log)
                );
                failed.push(case.name);
                Outcome::Failed(format!(
                    "{}\n--- log of the shared daemon\n{log}",
                    failure.0
                ))
            }
        };
        report.add(case.name, took, outcome);
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    println!(
        "e2e {}: {passed} passed, {} failed, {skipped} skipped in {:.0} s",
        options.title,
        failed.len(),
        begun.elapsed().as_secs_f64()
    );
    if let Some(path) = &options.junit {
        report.write(&format!("e2e {}", options.title), path)?;
    }
    Ok(failed.is_empty() && passed > 0)
}

async fn run_one<W: TestEnv>(ctx: &Arc<W>, case: &Case<W>) -> Result {
    let before = ctx.before()?;
    let limit = match ctx.backend() {
        Backend::Qemu => Duration::from_secs(case.seconds),
        Backend::Krun => Duration::from_secs(case.seconds * 6),
    };
    // A separate task, so that a panic fails only this case.
    let mut task = tokio::spawn((case.run)(ctx.clone()));
    let result = match tokio::time::timeout(limit, &mut task).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(Failure(format!("panicked: {panic}"))),
        Err(_) => {
            task.abort();
            Err(Failure(format!("timed out after {} s", limit.as_secs())))
        }
    };
    let leaks = ctx.after(before, result.is_err()).await;
    result.and(leaks)
}

impl TestEnv for TestContext {
    type Before = LeakSnapshot;

    fn backend(&self) -> Backend {
        self.backend
    }

    fn daemon(&self) -> &Service {
        self.node.service()
    }

    fn before(&self) -> Result<LeakSnapshot> {
        LeakSnapshot::take(&self.node)
    }

    async fn after(&self, before: LeakSnapshot, failed: bool) -> Result {
        let cleaned = clean(self).await;
        let leaks = before.restored(&self.node).await.map(drop);
        let replaced = match failed || cleaned.is_err() || leaks.is_err() {
            true => self.replace_shared_pod().await,
            false => Ok(()),
        };
        cleaned.and(leaks).and(replaced)
    }
}

/// Removes every pod of the shared node except the shared pod, and the shared pod's containers, so that a failed case does
/// not affect the next.
async fn clean(ctx: &TestContext) -> Result {
    ctx.shared_pod().await.empty().await?;
    for id in ctx.pods(PodSandboxFilter::default()).await? {
        ctx.node.cri.remove_pod(id).await?;
    }
    Ok(())
}

fn indent(text: &str) -> String {
    text.replace('\n', "\n      ")
}
