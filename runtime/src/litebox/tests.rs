//! Tests of boxes with a fake shim: pipeline and its undoing, joined starts, containers, deaths. Recovery is tested in
//! [`recovery`].

mod events;
mod recovery;

use crate::fake_shim::{FakeNode, image_id, is_process};
use crate::{BoxState, BoxliteRuntime, ContainerState, ErrorKind, LiteBox, RuntimeError, Stage};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Timeout of every wait.
const WAIT_TIMEOUT: Duration = Duration::from_secs(10);
const TERM: i32 = 15;

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < WAIT_TIMEOUT, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn one_box(node: &FakeNode) -> (BoxliteRuntime, LiteBox) {
    let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
    let litebox = runtime.create_box(node.box_options("b1")).await.unwrap();
    (runtime, litebox)
}

fn state_of(litebox: &LiteBox, id: &str) -> ContainerState {
    litebox.container(id).unwrap().state
}

async fn run_container(node: &FakeNode, litebox: &LiteBox, id: &str) {
    let created = litebox
        .create_container(node.container_options(id))
        .await
        .unwrap();
    assert_eq!(created.state, ContainerState::Created);
    litebox.start_container(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn create_starts_nothing_and_first_start_is_shared() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    node.faults.slow_start_ms.store(100, Ordering::SeqCst);
    let (runtime, litebox) = one_box(&node).await;
    assert_eq!(litebox.snapshot().state, BoxState::Created);
    assert_eq!(node.log(), "");

    let users = (0..5).map(|_| {
        let litebox = litebox.clone();
        tokio::spawn(async move { litebox.start().await })
    });
    for user in users.collect::<Vec<_>>() {
        user.await.unwrap().unwrap();
    }
    assert_eq!(shim.starts(), 1);
    let snapshot = litebox.snapshot();
    assert_eq!(snapshot.state, BoxState::Ready);
    assert!(is_process(&shim, snapshot.shim_pid.unwrap()));
    assert!(snapshot.timers.get("ready").unwrap() >= 100);
    assert_eq!(snapshot.timers.get("boot"), Some(7));
    // The same name returns the existing box; the same id with another name is refused.
    let mut again = node.box_options("b2");
    again.name = "name-b1".into();
    assert_eq!(runtime.create_box(again).await.unwrap().id(), "b1");
    let mut other = node.box_options("b1");
    other.name = "other".into();
    assert_eq!(
        runtime.create_box(other).await.unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
    assert_eq!(runtime.get_box("b").unwrap().id(), "b1");

    litebox.stats().await.unwrap();
    let metrics = litebox.metrics();
    assert_eq!((metrics.cpu_time_ms, metrics.memory_usage_bytes), (5, 60));
    assert_eq!(
        (metrics.network_bytes_sent, metrics.network_bytes_received),
        (11, 22)
    );
    runtime.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_stage_is_named_undone_and_retryable() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    let (_runtime, litebox) = one_box(&node).await;
    let bundle = node.at("s/s/b1");
    let faults = node.faults.clone();
    let failing = |stage| {
        let (litebox, bundle) = (litebox.clone(), bundle.clone());
        async move {
            let error = litebox.start().await.unwrap_err();
            assert_eq!(error.stage(), Some(stage), "{}", crate::report(&error));
            assert_eq!(litebox.snapshot().state, BoxState::Created);
            assert!(!bundle.exists());
            crate::report(&error)
        }
    };

    std::fs::rename(node.at("fw"), node.at("fw-away")).unwrap();
    assert!(failing(Stage::Image).await.contains("fw"));
    assert_eq!(node.log(), "");
    std::fs::rename(node.at("fw-away"), node.at("fw")).unwrap();

    std::fs::write(&bundle, "in the way").unwrap();
    let error = litebox.start().await.unwrap_err();
    assert_eq!(error.stage(), Some(Stage::Rootfs));
    std::fs::remove_file(&bundle).unwrap();

    std::fs::write(node.at("fail"), "").unwrap();
    assert!(failing(Stage::Spawn).await.contains("injected fault"));
    std::fs::remove_file(node.at("fail")).unwrap();

    faults.fail_create_sandbox.store(true, Ordering::SeqCst);
    failing(Stage::Spawn).await;
    assert!(
        node.log().ends_with("start b1\ndelete b1\n"),
        "{}",
        node.log()
    );
    faults.fail_create_sandbox.store(false, Ordering::SeqCst);

    faults.fail_start_sandbox.store(true, Ordering::SeqCst);
    let text = failing(Stage::Ready).await;
    assert!(text.contains("Kernel panic"), "{text}");
    assert!(!shim.alive(), "the shim of a failed start is alive");
    faults.fail_start_sandbox.store(false, Ordering::SeqCst);

    drop(shim);
    node.serve("b1").await;
    litebox.start().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_start_continues() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    node.faults.slow_start_ms.store(200, Ordering::SeqCst);
    let (_runtime, litebox) = one_box(&node).await;
    let left = tokio::time::timeout(Duration::from_millis(50), litebox.start()).await;
    assert!(left.is_err());
    litebox.start().await.unwrap();
    assert_eq!(shim.starts(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_cancels_start_and_denies_containers() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    node.faults.slow_start_ms.store(60_000, Ordering::SeqCst);
    let (_runtime, litebox) = one_box(&node).await;
    let starting = {
        let litebox = litebox.clone();
        tokio::spawn(async move { litebox.start().await })
    };
    until("boot begins", || shim.starts() == 1).await;
    let began = Instant::now();
    litebox.stop().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    let error = starting.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
    assert_eq!(litebox.snapshot().state, BoxState::NotReady);
    assert!(!shim.alive());
    litebox.stop().await.unwrap();
    let error = litebox
        .create_container(node.container_options("c1"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("stopped"), "{error}");
    // The refused container does not hold the image.
    assert!(_runtime.images().remove(&image_id()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn container_lifecycle_from_create_to_remove() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    let (runtime, litebox) = one_box(&node).await;
    // The first use starts the box.
    run_container(&node, &litebox, "c1").await;
    assert_eq!(state_of(&litebox, "c1"), ContainerState::Running);
    let again = litebox
        .create_container(node.container_options("c1"))
        .await
        .unwrap();
    assert_eq!(again.state, ContainerState::Running);
    assert_eq!(shim.creates.load(Ordering::SeqCst), 1);
    let mut clash = node.container_options("c2");
    clash.name = "name-c1".into();
    let error = litebox.create_container(clash).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(
        runtime.images().remove(&image_id()).await.is_err(),
        "an image in use cannot be removed"
    );

    shim.exit("c1", 3);
    until("exit shows", || {
        state_of(&litebox, "c1") == ContainerState::Exited
    })
    .await;
    let ended = litebox.container("c1").unwrap();
    assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
    assert!(ended.finished_at_ns >= ended.started_at_ns && ended.started_at_ns > 0);
    assert!(litebox.start_container("c1").await.is_err());
    litebox
        .stop_container("c1", WAIT_TIMEOUT, TERM)
        .await
        .unwrap();

    let (found, snapshot) = runtime.find_container("c").unwrap();
    assert_eq!((found.id(), snapshot.id.as_str()), ("b1", "c1"));
    litebox.remove_container("c1").await.unwrap();
    litebox.remove_container("c1").await.unwrap();
    assert!(shim.tasks().is_empty());
    assert!(!node.at("s/s/b1/c/c1").exists());
    assert!(runtime.images().remove(&image_id()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn stop_escalates_and_oom_is_reported() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    let (_runtime, litebox) = one_box(&node).await;
    node.faults.deaf.store(true, Ordering::SeqCst);
    run_container(&node, &litebox, "c1").await;
    litebox
        .stop_container("c1", Duration::from_millis(50), TERM)
        .await
        .unwrap();
    assert_eq!(litebox.container("c1").unwrap().exit_code, 137);
    let kills: Vec<String> = shim
        .calls
        .lock()
        .unwrap()
        .iter()
        .filter(|c| c.starts_with("kill"))
        .cloned()
        .collect();
    assert_eq!(kills, ["kill 15", "kill 9"]);

    node.faults.oom.store(true, Ordering::SeqCst);
    run_container(&node, &litebox, "c2").await;
    shim.exit("c2", 137);
    until("exit shows", || {
        state_of(&litebox, "c2") == ContainerState::Exited
    })
    .await;
    assert_eq!(litebox.container("c2").unwrap().reason, "OOMKilled");
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_create_is_undone_and_failed_start_reported() {
    let node = FakeNode::new();
    let shim = node.serve("b1").await;
    let (runtime, litebox) = one_box(&node).await;
    let mut unknown = node.container_options("c1");
    unknown.image_id = "sha256:none".into();
    let error = litebox.create_container(unknown).await.unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::InvalidArgument
        ),
        "{error}"
    );

    node.faults.fail_task_create.store(true, Ordering::SeqCst);
    let error = litebox
        .create_container(node.container_options("c1"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(litebox.containers().is_empty());
    assert!(!node.at("s/s/b1/c/c1").exists());
    node.faults.fail_task_create.store(false, Ordering::SeqCst);

    node.faults.fail_task_start.store(true, Ordering::SeqCst);
    litebox
        .create_container(node.container_options("c1"))
        .await
        .unwrap();
    litebox.start_container("c1").await.unwrap_err();
    let ended = litebox.container("c1").unwrap();
    assert_eq!(
        (ended.exit_code, ended.reason.as_str()),
        (128, "StartError")
    );
    assert!(ended.message.contains("/nowhere"), "{}", ended.message);
    litebox.remove_container("c1").await.unwrap();
    assert!(shim.tasks().is_empty());
    assert!(runtime.images().remove(&image_id()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn death_of_vm_or_shim_is_published_within_2_s() {
    let node = FakeNode::new();
    let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
    for (id, shim_dies) in [("b1", false), ("b2", true)] {
        let shim = node.serve(id).await;
        let litebox = runtime.create_box(node.box_options(id)).await.unwrap();
        let container = format!("c-{id}");
        run_container(&node, &litebox, &container).await;
        let died = Instant::now();
        if shim_dies {
            node.kill_shim(id);
        } else {
            shim.kill_vm();
        }
        until("NotReady", || {
            litebox.snapshot().state == BoxState::NotReady
        })
        .await;
        assert_eq!(state_of(&litebox, &container), ContainerState::Exited);
        assert!(
            died.elapsed() < Duration::from_secs(2),
            "{:?}",
            died.elapsed()
        );
        assert_eq!(litebox.container(&container).unwrap().exit_code, 137);
        assert!(
            litebox
                .snapshot()
                .reason
                .contains(if shim_dies { "shim" } else { "VM" })
        );
        assert!(matches!(
            litebox.portal(),
            Err(RuntimeError::BoxGone { .. })
        ));
        until("clean-up", || node.log().contains(&format!("delete {id}"))).await;
        until("shim ended", || !shim.alive()).await;
        litebox.remove().await.unwrap();
        assert!(!node.at("s/s").join(id).exists());
        assert!(runtime.get_box(id).is_err());
    }
    assert!(runtime.images().remove(&image_id()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn remove_is_complete_and_idempotent_in_any_state() {
    let node = FakeNode::new();
    let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
    for (id, start) in [("b1", false), ("b2", true)] {
        node.serve(id).await;
        let litebox = runtime.create_box(node.box_options(id)).await.unwrap();
        if start {
            run_container(&node, &litebox, "c1").await;
        }
        let both = tokio::join!(litebox.remove(), litebox.remove());
        both.0.unwrap();
        both.1.unwrap();
        litebox.remove().await.unwrap();
        litebox.stop().await.unwrap();
        assert_eq!(
            litebox.start().await.unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert!(runtime.boxes().is_empty());
        assert!(!node.at("s/s").join(id).exists());
    }
    let metrics = runtime.metrics();
    assert_eq!((metrics.boxes_created, metrics.boxes_destroyed), (2, 2));
    assert!(runtime.images().remove(&image_id()).await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn full_disk_does_not_keep_sandbox_from_being_freed() {
    let node = FakeNode::new();
    let root = node.at("r");
    crate::fake_shim::SmallDisk::mount(&root, 8 << 20);
    node.put_image();
    let shim = node.serve("b1").await;
    let (runtime, litebox) = one_box(&node).await;
    run_container(&node, &litebox, "c1").await;
    run_container(&node, &litebox, "c2").await;
    crate::fake_shim::fill(&root);
    let outcome = async {
        litebox.stop_container("c1", WAIT_TIMEOUT, TERM).await?;
        litebox.remove_container("c1").await?;
        litebox.stop().await?;
        litebox.remove().await
    };
    let outcome = outcome.await;
    let removed = runtime.images().remove(&image_id()).await;
    let alive = shim.alive();
    runtime.shutdown().await;
    let _ = nix::mount::umount2(&root, nix::mount::MntFlags::MNT_DETACH);
    outcome.unwrap();
    assert!(removed.unwrap() && !alive);
}
