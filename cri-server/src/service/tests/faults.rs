//! Faults by plan: a pod's life, from RunPodSandbox to RemovePodSandbox, with one fault at each hit of each failpoint of pods,
//! containers, database and recovery: an error, a delay in which the client gives up, a panic, and `kill -9` of the daemon.
//! Afterwards the calls succeed when they are repeated, and nothing remains: shims, bundles, namespaces, addresses, mounts,
//! files, records. Shims are fake (`boxlite_runtime::fake_shim`); the daemon, its death and its restart are real.

use super::fleet::{self, assert_no_leaks, create, inside, run, run_pod};
use super::*;
use boxlite_runtime::failpoint::{Action, POD_POINTS, Plan, RECOVERY_POINTS, arm, fired, named};
use boxlite_runtime::fake_shim::{FakeNode, image_id};
use boxlite_sys::file_lock::FileLock;
use std::fmt::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio_util::task::AbortOnDropHandle;

const TEST: &str = "faults::every_fault_is_undone_and_every_retry_succeeds";
/// Environment of a daemon in a separate process: the node's directory, the failpoint at which it is killed, and the hit.
const DAEMON: [&str; 3] = [
    "BOXLITE_FAULT_NODE",
    "BOXLITE_FAULT_POINT",
    "BOXLITE_FAULT_NTH",
];
/// Environment of a process that runs a part of the cases: its number. There are more than processors, because cases wait.
const SHARD: &str = "BOXLITE_FAULT_SHARD";
const SHARDS: usize = 6;
/// Time after which the client of a delayed call gives up, and the delay.
const CLIENT_TIMEOUT: Duration = Duration::from_millis(20);
const FAULT_DELAY: Duration = Duration::from_millis(60);
/// Timeout of a case. Each takes a fraction of a second, and many times that on a loaded machine.
const CASE_TIMEOUT: Duration = Duration::from_secs(300);
/// Point and hit at which a daemon is killed that leaves a running pod behind.
const RUNNING: (&str, u32) = ("container.started", 1);

/// Makes a call, and once more if it fails. With `patience`, the first client gives up after that time.
async fn twice<T, F: Future<Output = Result<Response<T>, Status>>>(
    patience: Option<Duration>,
    call: impl Fn() -> F,
) -> Result<T, String> {
    let first = match patience {
        Some(limit) => tokio::time::timeout(limit, call()).await.ok(),
        None => Some(call().await),
    };
    match first {
        Some(Ok(answer)) => Ok(answer.into_inner()),
        _ => match call().await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => Err(format!("repeated call: {status}")),
        },
    }
}

/// Creates and starts a container as a kubelet does: one that fails to start is removed and replaced.
async fn start_container(
    server: &Server,
    pod: &str,
    patience: Option<Duration>,
) -> Result<String, String> {
    let mut failed = String::new();
    for attempt in 0..2 {
        let create = || {
            let mut request = create(pod, "c");
            let config = request.config.as_mut().unwrap();
            config.metadata.as_mut().unwrap().attempt = attempt;
            server.create_container(Request::new(request))
        };
        let container_id = twice(patience, create).await?.container_id;
        let start = || {
            let container_id = container_id.clone();
            server.start_container(Request::new(StartContainerRequest { container_id }))
        };
        match twice(patience, start).await {
            Ok(_) => return Ok(container_id),
            Err(error) => failed = error,
        }
        remove_container(server, &container_id, patience).await?;
    }
    Err(failed)
}

async fn remove_container(
    server: &Server,
    id: &str,
    patience: Option<Duration>,
) -> Result<(), String> {
    let remove = || {
        let container_id = id.to_owned();
        server.remove_container(Request::new(RemoveContainerRequest { container_id }))
    };
    twice(patience, remove).await.map(drop)
}

async fn end_pod(server: &Server, id: &str, patience: Option<Duration>) -> Result<(), String> {
    let stop = || {
        let pod_sandbox_id = id.to_owned();
        server.stop_pod_sandbox(Request::new(StopPodSandboxRequest { pod_sandbox_id }))
    };
    twice(patience, stop).await?;
    let remove = || {
        let pod_sandbox_id = id.to_owned();
        server.remove_pod_sandbox(Request::new(RemovePodSandboxRequest { pod_sandbox_id }))
    };
    twice(patience, remove).await.map(drop)
}

/// A pod's life.
async fn live(server: &Server, node: &FakeNode, patience: Option<Duration>) -> Result<(), String> {
    let run = || async {
        let answer = server.run_pod_sandbox(Request::new(run_pod("web"))).await;
        if answer.is_err() {
            // Without any other call.
            assert_no_leaks(node);
        }
        answer
    };
    let pod = twice(patience, run).await?.pod_sandbox_id;
    let container = start_container(server, &pod, patience).await?;
    let stop = || {
        let container_id = container.clone();
        let request = StopContainerRequest {
            container_id,
            timeout: 1,
        };
        server.stop_container(Request::new(request))
    };
    twice(patience, stop).await?;
    remove_container(server, &container, patience).await?;
    // One container is removed with its pod.
    start_container(server, &pod, patience).await?;
    end_pod(server, &pod, patience).await
}

/// A node whose shims are served as long as it exists.
struct Attended {
    node: Arc<FakeNode>,
    _attending: AbortOnDropHandle<()>,
}

impl Attended {
    fn new() -> Self {
        let node = Arc::new(FakeNode::new());
        let attended = node.clone();
        let attending = tokio::spawn(async move { attended.attend().await });
        Self {
            node,
            _attending: AbortOnDropHandle::new(attending),
        }
    }
}

/// Opens the node as at the start of the daemon. Waits for the locks of the daemon before it, because tasks that were aborted are
/// dropped later than the handles.
async fn open(node: &FakeNode) -> Server {
    for lock in ["r/runtime.lock", "r/images/lock"] {
        while node.at(lock).exists() && FileLock::try_acquire(&node.at(lock)).unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let server = fleet::server(node).await;
    server.remove_orphans().await;
    server
}

/// Ends a daemon as by SIGTERM. No other handle may exist, because the roots are locked until the last one is dropped.
async fn close(server: Server) {
    server.close_streams();
    server.wait_for_tasks().await;
    server.runtime.clone().shutdown().await;
}

async fn pods(server: &Server) -> Vec<PodSandbox> {
    let list = Request::new(ListPodSandboxRequest::default());
    let answer = server.list_pod_sandbox(list).await.unwrap();
    answer.into_inner().items
}

/// Removes all pods and the image, and asserts that nothing remains, also after another restart.
async fn finish(server: Server, node: &FakeNode) -> Result<(), String> {
    for pod in pods(&server).await {
        end_pod(&server, &pod.id, None).await?;
    }
    let removed = server.runtime.images().remove(&image_id()).await;
    removed.map_err(|error| error.report())?;
    close(server).await;
    let server = open(node).await;
    assert!(pods(&server).await.is_empty(), "a pod came back");
    close(server).await;
    assert_no_leaks(node);
    Ok(())
}

/// Runs a daemon in a process that kills itself at a hit of a failpoint.
async fn killed_daemon(node: &FakeNode, point: &str, nth: u32) {
    let values = [
        node.at("").display().to_string(),
        point.into(),
        nth.to_string(),
    ];
    let output = tokio::process::Command::from(this_test())
        .envs(DAEMON.into_iter().zip(values))
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.signal(), Some(9), "not killed: {text}");
}

/// The daemon of [`killed_daemon`].
fn be_killed(directory: &str) {
    let value = |index: usize| std::env::var(DAEMON[index]).unwrap();
    let plan = Plan {
        point: named(&value(1)).expect("no such failpoint"),
        nth: value(2).parse().unwrap(),
        action: Action::Kill,
    };
    run(async {
        arm(Some(plan));
        let node = FakeNode::open(Path::new(directory));
        let server = open(&node).await;
        let outcome = live(&server, &node, None).await;
        panic!("survived {plan:?}: {outcome:?}");
    });
}

/// A fault in the life of a pod.
async fn fault_in_life(plan: Plan) -> Result<(), String> {
    let attended = Attended::new();
    let node = &*attended.node;
    let server = if plan.action == Action::Kill {
        killed_daemon(node, plan.point, plan.nth).await;
        let server = open(node).await;
        for pod in pods(&server).await {
            end_pod(&server, &pod.id, None).await?;
        }
        live(&server, node, None).await?;
        server
    } else {
        let server = open(node).await;
        let patience = matches!(plan.action, Action::Delay(_)).then_some(CLIENT_TIMEOUT);
        arm(Some(plan));
        live(&server, node, patience).await?;
        assert!(fired(), "not reached");
        server
    };
    assert!(pods(&server).await.is_empty(), "a pod remains");
    assert_no_leaks(node);
    finish(server, node).await
}

/// A fault in the recovery of a running pod.
async fn fault_in_recovery(plan: Plan) -> Result<(), String> {
    let attended = Attended::new();
    let node = &attended.node;
    killed_daemon(node, RUNNING.0, RUNNING.1).await;
    std::fs::create_dir(node.at("s/s/orphan")).unwrap();
    if plan.action == Action::Kill {
        killed_daemon(node, plan.point, plan.nth).await;
    } else {
        arm(Some(plan));
        let opening = node.clone();
        // The daemon may end with an error; systemd starts it again.
        if let Ok(server) = tokio::spawn(async move { open(&opening).await }).await {
            let ready = PodSandboxState::SandboxReady as i32;
            let states: Vec<i32> = pods(&server).await.iter().map(|pod| pod.state).collect();
            assert!(
                plan.action == Action::Panic || states == [ready],
                "a running pod ended: {states:?}"
            );
            close(server).await;
        }
        assert!(fired(), "not reached");
    }
    finish(open(node).await, node).await
}

/// Returns how often each point is hit without a fault.
async fn hits() -> Vec<(&'static str, u32)> {
    let attended = Attended::new();
    let server = open(&attended.node).await;
    arm(None);
    live(&server, &attended.node, None).await.unwrap();
    let hits = arm(None);
    assert_no_leaks(&attended.node);
    let of = |point| (point, hits.get(point).copied().unwrap_or(0));
    POD_POINTS.into_iter().map(of).collect()
}

/// Runs a case; returns the reason if it fails.
async fn outcome(
    case: impl Future<Output = Result<(), String>> + Send + 'static,
) -> Option<String> {
    let outcome = tokio::time::timeout(CASE_TIMEOUT, tokio::spawn(case)).await;
    arm(None);
    match outcome {
        Ok(Ok(Ok(()))) => None,
        Ok(Ok(Err(reason))) => Some(reason),
        Ok(Err(join)) => {
            let panic = join.into_panic();
            let text = panic.downcast_ref::<String>().cloned();
            Some(text.unwrap_or_else(|| "panicked".into()))
        }
        Err(_) => Some("timed out".into()),
    }
}

/// Returns all faults. A delay is the same at each hit, and a copy that could not be written is not an error.
async fn plans() -> Vec<Plan> {
    let mut plans = Vec::new();
    let recovery = RECOVERY_POINTS.map(|point| (point, 1));
    for (point, count) in hits().await.into_iter().chain(recovery) {
        assert!(count > 0, "{point} is not reached");
        for nth in 1..=count {
            let once = [Action::Error, Action::Delay(FAULT_DELAY)];
            let each = [Action::Panic, Action::Kill];
            let all = once.into_iter().chain(each);
            plans.extend(
                all.filter(|action| match action {
                    Action::Delay(_) => nth == 1,
                    Action::Error => nth == 1 || point != "database.copy",
                    Action::Panic | Action::Kill => true,
                })
                .map(|action| Plan { point, nth, action }),
            );
        }
    }
    plans
}

/// Runs every [`SHARDS`]th case, because a plan is its process's.
fn run_shard(shard: usize) {
    run(async {
        let mut failures = String::new();
        let mut cases = 0;
        for plan in plans().await.into_iter().skip(shard).step_by(SHARDS) {
            cases += 1;
            let failed = match RECOVERY_POINTS.contains(&plan.point) {
                true => outcome(fault_in_recovery(plan)).await,
                false => outcome(fault_in_life(plan)).await,
            };
            if let Some(reason) = failed {
                writeln!(failures, "{plan:?}: {reason}").unwrap();
            }
        }
        assert!(failures.is_empty(), "{failures}");
        println!("{cases} faults");
    });
}

/// Returns this test in another process.
fn this_test() -> std::process::Command {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("service::tests::{TEST}"), "--nocapture"]);
    command
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn every_fault_is_undone_and_every_retry_succeeds() {
    if !inside(TEST) {
        return;
    }
    if let Ok(directory) = std::env::var(DAEMON[0]) {
        return be_killed(&directory);
    }
    if let Ok(shard) = std::env::var(SHARD) {
        return run_shard(shard.parse().unwrap());
    }
    let start = |shard: usize| {
        let mut command = this_test();
        command.env(SHARD, shard.to_string());
        // Most panics are injected, and resolving a backtrace takes a second.
        command.env("RUST_BACKTRACE", "0");
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let shards: Vec<_> = (0..SHARDS).map(start).collect();
    let outputs = shards
        .into_iter()
        .map(|shard| shard.wait_with_output().unwrap());
    let failed: Vec<String> = outputs
        .filter(|output| !output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stderr).into_owned())
        .collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
