//! The runner: all cases by name, one after the other (two cores run one VM well), each with a time limit and a look for
//! what it left behind it, a line each and one count at the end.
//!
//! A case that panics, hangs, fails or leaves something behind is a failure. What does not run in these surroundings is
//! named with the reason and counted as skipped. What cases share, and how leaks are found, is a [`Surroundings`]: the
//! [`World`] of boxlite-cri's suite, the lab of [`crate::containerd`].

use crate::leak::Trace;
use crate::outcome::{Failure, Result};
use crate::service::Service;
use crate::world::{Home, World};
use futures::FutureExt;
use futures::future::BoxFuture;
use k8s_cri::v1::{PodSandboxFilter, RemovePodSandboxRequest, StopPodSandboxRequest};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Lines of the shared daemon's log that a failure shows.
const LOG_LINES: usize = 12;

/// What cases run in.
pub trait Surroundings: Send + Sync + 'static {
    /// Traces of what was there before a case.
    type Before;

    /// Which VMM, and how patient to be.
    fn home(&self) -> Home;

    /// The daemon that cases share.
    fn daemon(&self) -> &Service;

    /// Looks before a case.
    fn before(&self) -> Result<Self::Before>;

    /// Cleans up behind one and fails where something is left.
    async fn after(&self, before: Self::Before, failed: bool) -> Result;
}

/// What a test is given.
pub type Shared = Arc<World>;

type Run<W> = Box<dyn Fn(Arc<W>) -> BoxFuture<'static, Result> + Send + Sync>;
type Condition<W> = Box<dyn Fn(&W) -> bool + Send + Sync>;

/// A named test.
pub struct Case<W = World> {
    name: &'static str,
    seconds: u64,
    unless: Option<(Condition<W>, &'static str)>,
    run: Run<W>,
}

/// A test `run` called `name` that takes at most so many seconds on QEMU.
pub fn case<W, F, Fut>(name: &'static str, seconds: u64, run: F) -> Case<W>
where
    F: Fn(Arc<W>) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result> + Send + 'static,
{
    Case {
        name,
        seconds,
        unless: None,
        run: Box::new(move |world| run(world).boxed()),
    }
}

impl<W: Surroundings> Case<W> {
    /// For lists.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Doesn't run where `condition` holds.
    pub fn unless(
        mut self,
        condition: impl Fn(&W) -> bool + Send + Sync + 'static,
        reason: &'static str,
    ) -> Self {
        self.unless = Some((Box::new(condition), reason));
        self
    }

    /// Doesn't run in that home.
    pub fn not_in(self, home: Home, reason: &'static str) -> Self {
        self.unless(move |world| world.home() == home, reason)
    }
}

/// Runs all cases whose name contains `filter` and ends with a line that begins with `title`; whether all passed.
pub async fn run<W: Surroundings>(
    world: &Arc<W>,
    title: &str,
    filter: &str,
    cases: Vec<Case<W>>,
) -> Result<bool> {
    let begun = Instant::now();
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for case in cases.iter().filter(|c| c.name.contains(filter)) {
        if let Some((condition, reason)) = &case.unless
            && condition(world)
        {
            println!("not run here: {}: {reason}", case.name);
            skipped += 1;
            continue;
        }
        let mark = world.daemon().length();
        let start = Instant::now();
        let outcome = one(world, case).await;
        let took = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("ok    {:<52} {took:>6.1} s", case.name);
            }
            Err(failure) => {
                println!(
                    "FAIL  {:<52} {took:>6.1} s\n      {}",
                    case.name,
                    indent(&failure.0)
                );
                println!(
                    "      --- the shared daemon's log\n      {}",
                    indent(&world.daemon().tail(mark, LOG_LINES))
                );
                failed.push(case.name);
            }
        }
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    println!(
        "e2e {title}: {passed} passed, {} failed, {skipped} skipped in {:.0} s",
        failed.len(),
        begun.elapsed().as_secs_f64()
    );
    Ok(failed.is_empty() && passed > 0)
}

async fn one<W: Surroundings>(world: &Arc<W>, case: &Case<W>) -> Result {
    let before = world.before()?;
    let limit = match world.home() {
        Home::Qemu => Duration::from_secs(case.seconds),
        Home::Krun => Duration::from_secs(case.seconds * 6),
    };
    // In a task of its own: a panic is this case's failure, not the suite's end.
    let mut task = tokio::spawn((case.run)(world.clone()));
    let outcome = match tokio::time::timeout(limit, &mut task).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(panic)) => Err(Failure(format!("panicked: {panic}"))),
        Err(_) => {
            task.abort();
            Err(Failure(format!("not done within {} s", limit.as_secs())))
        }
    };
    let left = world.after(before, outcome.is_err()).await;
    outcome.and(left)
}

impl Surroundings for World {
    type Before = Trace;

    fn home(&self) -> Home {
        self.home
    }

    fn daemon(&self) -> &Service {
        self.node.service()
    }

    fn before(&self) -> Result<Trace> {
        Trace::take(&self.node)
    }

    async fn after(&self, before: Trace, failed: bool) -> Result {
        let cleaned = clean(self).await;
        let left = before.restored(&self.node).await.map(drop);
        let renewed = match failed || cleaned.is_err() || left.is_err() {
            true => self.renew().await,
            false => Ok(()),
        };
        cleaned.and(left).and(renewed)
    }
}

/// Removes every pod of the shared node but the common one, and its containers: a failed test must not fail the next.
async fn clean(world: &World) -> Result {
    let common = world.pod().await;
    common.empty().await?;
    let mut client = world.node.cri.runtime();
    for pod_sandbox_id in world.pods(PodSandboxFilter::default()).await? {
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        client.stop_pod_sandbox(stop).await?;
        let remove = RemovePodSandboxRequest { pod_sandbox_id };
        client.remove_pod_sandbox(remove).await?;
    }
    Ok(())
}

fn indent(text: &str) -> String {
    text.replace('\n', "\n      ")
}
