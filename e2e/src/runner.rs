//! The runner: all cases by name, one after the other (two cores run one VM well), each with a time limit and a leak check
//! of the shared node behind it, a line each and one count at the end.
//!
//! A case that panics, hangs, fails or leaves something behind is a failure. What does not run in a home is named with
//! the reason and counted as skipped.

use crate::leak::Trace;
use crate::outcome::{Failure, Result};
use crate::world::{Home, World};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a test is given.
pub type Shared = Arc<World>;

/// A named test.
pub struct Case {
    name: &'static str,
    seconds: u64,
    not_in: Option<(Home, &'static str)>,
    run: Box<dyn Fn(Shared) -> BoxFuture<'static, Result> + Send + Sync>,
}

/// A test `run` called `name` that takes at most so many seconds on QEMU.
pub fn case<F, Fut>(name: &'static str, seconds: u64, run: F) -> Case
where
    F: Fn(Shared) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result> + Send + 'static,
{
    Case {
        name,
        seconds,
        not_in: None,
        run: Box::new(move |world| run(world).boxed()),
    }
}

impl Case {
    /// Doesn't run in that home.
    pub fn not_in(mut self, home: Home, reason: &'static str) -> Self {
        self.not_in = Some((home, reason));
        self
    }
}

/// Runs all cases whose name contains `filter`; whether all passed.
pub async fn run(home: Home, filter: &str, cases: Vec<Case>) -> Result<bool> {
    let world = Arc::new(World::build(home).await?);
    let begun = Instant::now();
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    for case in cases.iter().filter(|c| c.name.contains(filter)) {
        if let Some((_, reason)) = case.not_in.filter(|(h, _)| *h == home) {
            println!("not run in this home: {}: {reason}", case.name);
            skipped += 1;
            continue;
        }
        let mark = world.node.log_length();
        let start = Instant::now();
        match one(&world, case).await {
            Ok(()) => {
                passed += 1;
                println!(
                    "ok    {:<52} {:>6.1} s",
                    case.name,
                    start.elapsed().as_secs_f64()
                );
            }
            Err(failure) => {
                println!(
                    "FAIL  {:<52} {:>6.1} s\n      {}",
                    case.name,
                    start.elapsed().as_secs_f64(),
                    indent(&failure.0)
                );
                println!(
                    "      --- the shared daemon's log\n      {}",
                    indent(&world.node.log_since(mark, 12))
                );
                failed.push(case.name);
            }
        }
    }
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    println!(
        "e2e {}: {passed} passed, {} failed, {skipped} skipped in {:.0} s",
        home.vmm(),
        failed.len(),
        begun.elapsed().as_secs_f64()
    );
    Ok(failed.is_empty() && passed > 0)
}

async fn one(world: &Shared, case: &Case) -> Result {
    let before = Trace::take(&world.node)?;
    let limit = match world.home {
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
    let cleaned = clean(world).await;
    let left = before.restored(&world.node).await.map(drop);
    outcome.and(cleaned).and(left)
}

/// Removes every pod of the shared node: a failed test must not fail the next.
async fn clean(world: &Shared) -> Result {
    let mut client = world.node.cri.runtime();
    let list = client
        .list_pod_sandbox(k8s_cri::v1::ListPodSandboxRequest::default())
        .await?
        .into_inner();
    for pod in list.items {
        let pod_sandbox_id = pod.id;
        client
            .stop_pod_sandbox(k8s_cri::v1::StopPodSandboxRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
            })
            .await?;
        client
            .remove_pod_sandbox(k8s_cri::v1::RemovePodSandboxRequest { pod_sandbox_id })
            .await?;
    }
    Ok(())
}

fn indent(text: &str) -> String {
    text.replace('\n', "\n      ")
}

impl Case {
    /// For lists.
    pub fn name(&self) -> &'static str {
        self.name
    }
}
