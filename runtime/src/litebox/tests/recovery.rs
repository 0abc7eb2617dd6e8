//! Tests of recovery after the death of a runtime, which is simulated by dropping its tokio runtime without cleanup.

use super::*;
use crate::box_state::Phase;
use crate::database::Database;
use crate::filesystem_layout::FilesystemLayout;
use std::os::unix::fs::PermissionsExt;

/// Runs `future` in a separate tokio runtime and drops that with all its tasks.
pub(super) fn live_and_die<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> T {
    let tokio = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let result = tokio.block_on(async { tokio::spawn(future).await.unwrap() });
    tokio.shutdown_timeout(Duration::from_secs(5));
    result
}

#[test]
fn live_box_is_adopted_with_missed_exits() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    let shim = shims.block_on(node.serve("b1"));
    let first = node.clone();
    live_and_die(async move {
        let (_runtime, litebox) = one_box(&first).await;
        for id in ["c1", "c2", "c3"] {
            run_container(&first, &litebox, id).await;
        }
        litebox
            .create_container(first.container_options("c4"))
            .await
            .unwrap();
    });
    shim.exit("c2", 42);
    let second = node.clone();
    let starts = shim.starts();
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
        let litebox = runtime.get_box("b1").unwrap();
        let snapshot = litebox.snapshot();
        assert_eq!(
            (snapshot.state, snapshot.metadata.as_slice()),
            (BoxState::Ready, &b"m"[..])
        );
        assert_eq!(state_of(&litebox, "c1"), ContainerState::Running);
        let ended = litebox.container("c2").unwrap();
        assert_eq!((ended.state, ended.exit_code), (ContainerState::Exited, 42));
        assert_eq!(state_of(&litebox, "c4"), ContainerState::Created);
        assert!(
            runtime.images().remove(&image_id()).await.is_err(),
            "the image is held again"
        );
        // The box is watched and usable.
        shim.exit("c3", 7);
        until("exit shows", || {
            state_of(&litebox, "c3") == ContainerState::Exited
        })
        .await;
        litebox.start_container("c4").await.unwrap();
        litebox.stats().await.unwrap();
        assert_eq!(shim.starts(), starts);
        litebox.remove().await.unwrap();
        assert!(!shim.alive());
    });
}

#[test]
fn box_with_dead_shim_becomes_not_ready() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    shims.block_on(node.serve("b1"));
    let first = node.clone();
    live_and_die(async move {
        let (_runtime, litebox) = one_box(&first).await;
        run_container(&first, &litebox, "c1").await;
    });
    node.kill_shim("b1");
    let second = node.clone();
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
        let litebox = runtime.get_box("b1").unwrap();
        assert_eq!(litebox.snapshot().state, BoxState::NotReady);
        let ended = litebox.container("c1").unwrap();
        assert_eq!(
            (ended.state, ended.exit_code, ended.reason.as_str()),
            (ContainerState::Exited, 137, "Unknown")
        );
        assert!(ended.finished_at_ns > 0);
        until("clean-up", || second.log().contains("delete b1")).await;
        litebox.remove().await.unwrap();
        assert!(runtime.images().remove(&image_id()).await.unwrap());
    });
    // The rows have been deleted.
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
        assert!(runtime.boxes().is_empty() && runtime.containers().is_empty());
    });
}

#[test]
fn interrupted_start_is_undone_and_retryable() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    let shim = shims.block_on(node.serve("b1"));
    node.faults.slow_start_ms.store(60_000, Ordering::SeqCst);
    let (first, booting) = (node.clone(), shim.clone());
    live_and_die(async move {
        let (_runtime, litebox) = one_box(&first).await;
        drop(tokio::spawn(async move { litebox.start().await }));
        until("boot begins", || booting.starts() == 1).await;
    });
    node.faults.slow_start_ms.store(0, Ordering::SeqCst);
    let second = node.clone();
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
        assert!(second.log().ends_with("delete b1\n"), "{}", second.log());
        assert!(!second.at("s/s/b1").exists());
        let litebox = runtime.get_box("b1").unwrap();
        assert_eq!(litebox.snapshot().state, BoxState::Created);
        litebox.start().await.unwrap();
        litebox.remove().await.unwrap();
    });
}

/// As after a power cut: `state` is empty, and the scratch disks are still in `root`.
#[test]
fn recovery_removes_scratch_disks_without_a_box() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    shims.block_on(node.serve("b1"));
    let first = node.clone();
    live_and_die(async move {
        drop(one_box(&first).await);
    });
    let disk = |name: &str| node.at("r/scratch").join(name);
    for name in ["b1.img", "gone.img"] {
        std::fs::write(disk(name), "x").unwrap();
    }
    std::fs::remove_dir_all(node.at("s")).unwrap();
    let second = node.clone();
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
        let left = |name: &str| second.at("r/scratch").join(name).exists();
        assert!(!left("gone.img"));
        assert!(left("b1.img"), "its box exists");
        runtime.get_box("b1").unwrap().remove().await.unwrap();
        assert!(!left("b1.img"), "removed with its box");
    });
}

#[test]
fn recovery_resumes_removal_and_removes_orphans() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    let shim = shims.block_on(node.serve("b1"));
    shims.block_on(node.serve("b2"));
    let first = node.clone();
    live_and_die(async move {
        let (runtime, litebox) = one_box(&first).await;
        run_container(&first, &litebox, "c1").await;
        let other = runtime.create_box(first.box_options("b2")).await.unwrap();
        other.start().await.unwrap();
    });
    std::fs::create_dir(node.at("s/s/orphan")).unwrap();
    let layout = FilesystemLayout::new(&node.at("r"), &node.at("s")).unwrap();
    let database = Database::open(&layout).unwrap();
    live_and_die(async move {
        // As if the runtime had died right after writing these rows.
        for (mut row, containers) in database.load().await.unwrap() {
            for mut container in containers {
                container.complete = false;
                container.snapshot.state = ContainerState::Unknown;
                database.put_container(container).await.unwrap();
            }
            if row.options.id == "b2" {
                row.phase = Phase::Removing;
                database.update_box(row).await.unwrap();
            }
        }
    });
    let second = node.clone();
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
        assert!(second.log().contains("delete orphan"));
        assert!(!second.at("s/s/orphan").exists());
        assert!(runtime.containers().is_empty());
        assert!(
            shim.tasks().is_empty(),
            "the task of the partially created container is deleted"
        );
        until("b2 is removed", || runtime.get_box("b2").is_err()).await;
        assert!(!second.at("s/s/b2").exists());
        assert_eq!(
            runtime.get_box("b1").unwrap().snapshot().state,
            BoxState::Ready
        );
        assert!(runtime.images().remove(&image_id()).await.unwrap());
    });
}

#[test]
fn running_box_is_adopted_without_database() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    let shim = shims.block_on(node.serve("b1"));
    let first = node.clone();
    live_and_die(async move {
        let (_runtime, litebox) = one_box(&first).await;
        run_container(&first, &litebox, "c1").await;
    });
    let starts = shim.starts();
    for garbage in [&b"no database"[..], b""] {
        let second = node.clone();
        std::fs::write(node.at("r/runtime.db"), garbage).unwrap();
        live_and_die(async move {
            let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
            let litebox = runtime.get_box("b1").unwrap();
            assert_eq!(litebox.snapshot().state, BoxState::Ready);
            assert_eq!(state_of(&litebox, "c1"), ContainerState::Running);
            assert!(runtime.metrics().quarantined > 0);
            assert!(runtime.unmanaged().is_empty());
            litebox.stats().await.unwrap();
        });
        assert!(shim.alive());
    }
    assert_eq!(shim.starts(), starts);
}

#[test]
fn running_box_is_adopted_by_its_bundle_alone() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    let shim = shims.block_on(node.serve("b1"));
    let first = node.clone();
    let expected = live_and_die(async move {
        let runtime = BoxliteRuntime::open(first.options()).await.unwrap();
        let mut options = first.box_options("b1");
        options.metadata = b"first line\nsecond".to_vec();
        let litebox = runtime.create_box(options).await.unwrap();
        run_container(&first, &litebox, "c1").await;
        (litebox.snapshot(), litebox.containers())
    });
    let starts = shim.starts();
    for record in ["record", "c/c1/record"] {
        let path = node.at("s/s/b1").join(record);
        let mode = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600, "{record}");
    }
    std::fs::write(node.at("r/runtime.db"), "no database").unwrap();
    std::fs::remove_dir_all(node.at("s/records")).unwrap();
    let second = node.clone();
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
        assert!(runtime.unmanaged().is_empty());
        let litebox = runtime.get_box("b1").unwrap();
        let (snapshot, containers) = expected;
        assert_eq!(litebox.snapshot().state, BoxState::Ready);
        assert_eq!(litebox.snapshot().options, snapshot.options);
        assert_eq!(litebox.containers(), containers);
        assert_eq!(containers[0].state, ContainerState::Running);
        litebox.stats().await.unwrap();
        litebox.remove().await.unwrap();
        assert!(!second.at("s/s/b1").exists());
    });
    assert_eq!(shim.starts(), starts);
    // The files of a removed box restore nothing.
    live_and_die(async move {
        std::fs::remove_file(node.at("r/runtime.db")).unwrap();
        let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
        assert!(runtime.boxes().is_empty());
    });
}

#[test]
fn running_box_without_any_record_is_left_alone() {
    let shims = tokio::runtime::Runtime::new().unwrap();
    let node = std::sync::Arc::new(FakeNode::new());
    let shim = shims.block_on(node.serve("b1"));
    let first = node.clone();
    live_and_die(async move {
        let (_runtime, litebox) = one_box(&first).await;
        litebox.start().await.unwrap();
    });
    let address = format!("unix://{}", node.at("f/b1").display());
    std::fs::write(node.at("s/s/b1/address"), address).unwrap();
    std::fs::remove_file(node.at("r/runtime.db")).unwrap();
    std::fs::remove_dir_all(node.at("s/records")).unwrap();
    std::fs::remove_file(node.at("s/s/b1/record")).unwrap();
    let second = node.clone();
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(second.options()).await.unwrap();
        assert!(runtime.boxes().is_empty());
        assert_eq!(runtime.unmanaged(), ["b1"]);
        assert!(!second.log().contains("delete b1"));
        assert!(second.at("s/s/b1").exists());
    });
    assert!(shim.alive());
    // Once the shim has ended, the bundle is an orphan.
    node.kill_shim("b1");
    live_and_die(async move {
        let runtime = BoxliteRuntime::open(node.options()).await.unwrap();
        assert!(runtime.unmanaged().is_empty());
        assert!(!node.at("s/s/b1").exists());
    });
}

#[test]
fn open_refuses_roots_in_use() {
    let node = std::sync::Arc::new(FakeNode::new());
    live_and_die(async move {
        let first = BoxliteRuntime::open(node.options()).await.unwrap();
        let error = BoxliteRuntime::open(node.options()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        first.shutdown().await;
    });
}
