//! Faults by plan in the image store: a pull and a removal with one fault at each hit of each failpoint of images: an error, a
//! delay in which the client gives up, a panic, and `kill -9` of the process. Afterwards the calls succeed when they are repeated,
//! the layers are those of a pull without faults, and nothing remains.

use super::*;
use crate::failpoint::{Action, IMAGE_POINTS, Plan, arm, fired, named};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

const TEST: &str = "images::tests::walk::every_fault_of_a_pull_is_undone_and_the_retry_succeeds";
/// Environment of the process that walks, because a plan is its process's.
const WALK: &str = "BOXLITE_FAULT_WALK";
/// Environment of a process that is killed: directory, reference, failpoint and hit.
const KILLED: [&str; 4] = [
    "BOXLITE_FAULT_DIR",
    "BOXLITE_FAULT_IMAGE",
    "BOXLITE_FAULT_POINT",
    "BOXLITE_FAULT_NTH",
];
/// Time after which the client of a delayed call gives up, and the delay.
const CLIENT_TIMEOUT: Duration = Duration::from_millis(20);
const FAULT_DELAY: Duration = Duration::from_millis(60);

type Files = BTreeMap<String, Vec<u8>>;

/// Pulls an image and removes it; each call is repeated if it fails. Returns the layer files in between.
async fn live(
    store: &TestStore,
    reference: &str,
    client_timeout: Option<Duration>,
) -> Result<Files, String> {
    let first = async {
        let pulled = store.pull(reference).await;
        pulled.is_ok() && store.images.status(reference).is_some()
    };
    let pulled = match client_timeout {
        Some(limit) => tokio::time::timeout(limit, first).await.unwrap_or(false),
        None => first.await,
    };
    if !pulled {
        let again = store.pull(reference).await;
        again.map_err(|error| format!("repeated pull: {}", error.report()))?;
    }
    let files = store.files("layers/sha256").into_iter().map(|name| {
        let path = store.dir.path().join("images/layers/sha256").join(&name);
        (name, std::fs::read(path).unwrap())
    });
    let files = files.collect();
    if store.images.remove(reference).await.is_err() {
        let again = store.images.remove(reference).await;
        again.map_err(|error| format!("repeated removal: {}", error.report()))?;
    }
    Ok(files)
}

/// Runs the calls in a process that kills itself at a hit of a failpoint.
async fn kill(directory: &Path, reference: &str, plan: Plan) {
    let values = [
        directory.display().to_string(),
        reference.into(),
        plan.point.into(),
        plan.nth.to_string(),
    ];
    let output = tokio::process::Command::from(this_test())
        .envs(KILLED.into_iter().zip(values))
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.signal(), Some(9), "not killed: {text}");
}

/// The process of [`kill`].
async fn be_killed() {
    let value = |index: usize| std::env::var(KILLED[index]).unwrap();
    let directory = std::path::PathBuf::from(value(0));
    let root = directory.join("images");
    arm(Some(Plan {
        point: named(&value(2)).unwrap(),
        nth: value(3).parse().unwrap(),
        action: Action::Kill,
    }));
    let images = ImageManager::open(&root, options(&directory)).await;
    let images = images.unwrap();
    let pulled = images.pull(&value(1), None, None).await;
    let removed = images.remove(&value(1)).await;
    panic!("survived: {pulled:?}, {removed:?}");
}

async fn fault(reference: &str, expected: &Files, plan: Plan) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    if plan.action == Action::Kill {
        kill(dir.path(), reference, plan).await;
    }
    let root = dir.path().join("images");
    let images = ImageManager::open(&root, options(dir.path())).await;
    let images = images.unwrap();
    let mut store = TestStore { dir, images };
    let files = if plan.action == Action::Kill {
        live(&store, reference, None).await?
    } else {
        let client_timeout = matches!(plan.action, Action::Delay(_)).then_some(CLIENT_TIMEOUT);
        arm(Some(plan));
        let files = live(&store, reference, client_timeout).await?;
        assert!(fired(), "not reached");
        files
    };
    assert!(files == *expected, "the layers differ");
    store = store.reopened().await;
    store.images.remove(reference).await.unwrap();
    store.assert_empty().await;
    Ok(())
}

/// Returns all faults. A delay is the same at each hit.
async fn plans(reference: &str) -> (Files, Vec<Plan>) {
    let store = TestStore::new().await;
    arm(None);
    let files = live(&store, reference, None).await.unwrap();
    let hits = arm(None);
    store.assert_empty().await;
    let mut plans = Vec::new();
    for point in IMAGE_POINTS {
        let count = hits.get(point).copied().unwrap_or(0);
        assert!(count > 0, "{point} is not reached");
        for nth in 1..=count {
            let delay = (nth == 1).then_some(Action::Delay(FAULT_DELAY));
            let actions = [Action::Error, Action::Panic, Action::Kill];
            let actions = actions.into_iter().chain(delay);
            plans.extend(actions.map(|action| Plan { point, nth, action }));
        }
    }
    (files, plans)
}

async fn walk() {
    let registry = Registry::start().await;
    let layers = [layer("a", 1, 60_000), layer("b", 2, 7_000)];
    registry.push(
        "r",
        "v",
        &layers.each_ref().map(|tar| (tar.as_slice(), Pack::Gzip)),
    );
    let reference = registry.name("r:v");
    let (files, plans) = plans(&reference).await;
    let mut failures = Vec::new();
    for plan in &plans {
        let (reference, files, plan) = (reference.clone(), files.clone(), *plan);
        let case = tokio::spawn(async move { fault(&reference, &files, plan).await });
        match case.await {
            Ok(Ok(())) => {}
            outcome => failures.push(format!("{plan:?}: {outcome:?}")),
        }
        arm(None);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    println!("{} faults", plans.len());
}

/// Returns this test in another process.
fn this_test() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", TEST, "--nocapture"]);
    // Most panics are injected, and resolving a backtrace takes a second.
    command.env("RUST_BACKTRACE", "0");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn every_fault_of_a_pull_is_undone_and_the_retry_succeeds() {
    if std::env::var_os(KILLED[0]).is_some() {
        return be_killed().await;
    }
    if std::env::var_os(WALK).is_some() {
        return walk().await;
    }
    let output = this_test().env(WALK, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
}
