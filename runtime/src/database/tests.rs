//! Tests of the database: reload, file modes, schema version and cascades.

use super::*;
use crate::types::ContainerState;

pub(crate) fn box_row(id: &str, name: &str) -> BoxRow {
    BoxRow {
        options: BoxOptions {
            id: id.into(),
            name: name.into(),
            metadata: vec![0, 255, 7],
            vcpus: 1,
            memory_mib: 256,
            containers_bytes: 0,
            scratch_bytes: 1 << 30,
            hostname: "h".into(),
            netns: None,
            host_network: false,
            sysctls: Default::default(),
            cgroup_parent: String::new(),
            vmm: None,
            debug_console: false,
        },
        phase: Phase::Created,
        reason: String::new(),
        created_at_ns: 5,
        shim: None,
        timers: StageTimers::default(),
    }
}

fn container_row(id: &str, box_id: &str) -> ContainerRow {
    ContainerRow {
        snapshot: ContainerSnapshot {
            id: id.into(),
            box_id: box_id.into(),
            name: "c".into(),
            image_id: "sha256:0".into(),
            image_volumes: vec!["sha256:1".into()],
            state: ContainerState::Created,
            created_at_ns: 1,
            started_at_ns: 0,
            finished_at_ns: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            metadata: b"\x00m".to_vec(),
            log_path: None,
            tty: false,
            stdin: false,
            stdin_once: false,
            user: None,
        },
        complete: true,
        oom: false,
    }
}

#[tokio::test]
async fn load_returns_rows_after_reopen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runtime.db");
    let first = box_row("a", "pod-a");
    let container = container_row("c1", "a");
    {
        let database = Database::open(&path).unwrap();
        database.insert_box(first.clone()).await.unwrap();
        database.insert_box(box_row("b", "pod-b")).await.unwrap();
        database.put_container(container.clone()).await.unwrap();
        database
            .put_container(container_row("c2", "b"))
            .await
            .unwrap();
    }
    let database = Database::open(&path).unwrap();
    let rows = database.load().await.unwrap();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0], (first.clone(), vec![container]));

    let mut changed = first;
    changed.phase = Phase::Ready;
    database.update_box(changed.clone()).await.unwrap();
    database.delete_box("b").await.unwrap();
    database.delete_box("b").await.unwrap();
    let rows = database.load().await.unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].0, changed);
    // The container of the deleted box was deleted too.
    database.insert_box(box_row("b", "pod-b")).await.unwrap();
    let rows = database.load().await.unwrap();
    assert!(rows[1].1.is_empty());
}

#[tokio::test]
async fn insert_rejects_duplicate_name_and_missing_box() {
    let directory = tempfile::tempdir().unwrap();
    let database = Database::open(&directory.path().join("runtime.db")).unwrap();
    database.insert_box(box_row("a", "pod")).await.unwrap();
    assert!(database.insert_box(box_row("b", "pod")).await.is_err());
    assert_eq!(database.load().await.unwrap().len(), 1);
    assert!(
        database
            .put_container(container_row("c", "none"))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn open_makes_files_private_and_refuses_newer_schema() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runtime.db");
    let database = Database::open(&path).unwrap();
    database.insert_box(box_row("a", "pod")).await.unwrap();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        let mode = entry.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{:?}", entry.path());
    }
    database
        .run("test", |connection| {
            connection.pragma_update(None, "user_version", 99)
        })
        .await
        .unwrap();
    drop(database);
    let error = Database::open(&path).unwrap_err();
    assert!(
        matches!(error, RuntimeError::DatabaseSchema { found: 99, .. }),
        "{error}"
    );
}

#[tokio::test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
async fn delete_works_on_full_disk_and_is_deferred_without_reserve() {
    let disk = crate::fake_shim::SmallDisk::new(8 << 20);
    let path = disk.path().join("runtime.db");
    let database = Database::open(&path).unwrap();
    for id in ["a", "b"] {
        database.insert_box(box_row(id, id)).await.unwrap();
        let container = container_row(&format!("c-{id}"), id);
        database.put_container(container).await.unwrap();
    }
    disk.fill();
    let mut large = box_row("a", "a");
    large.options.metadata = vec![1; 4 << 20];
    let error = database.update_box(large).await.unwrap_err();
    assert_eq!(error.kind(), crate::ErrorKind::ResourceExhausted, "{error}");
    database.delete_container("c-a").await.unwrap();
    assert!(
        !path.with_extension("reserve").exists(),
        "the reserve is used"
    );
    disk.fill();
    for _ in 0..1000 {
        database.delete_box("a").await.unwrap();
        database.delete_box("b").await.unwrap();
    }
    disk.make_room();
    database.insert_box(box_row("new", "b")).await.unwrap();
    let rows = database.load().await.unwrap();
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert!(path.with_extension("reserve").exists());
}
