//! Tests of the database: reload, file modes, schema version and cascades.

use super::*;
use crate::types::ContainerState;
use std::os::unix::fs::PermissionsExt;

pub(crate) fn box_row(id: &str, name: &str) -> BoxRow {
    BoxRow {
        options: BoxOptions {
            pod: None,
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
            passt: false,
            sysctls: Default::default(),
            cgroup_parent: String::new(),
            vmm: None,
            debug_console: false,
            shared_volume_writers: Default::default(),
            vmm_ids: None,
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

/// Opens the database `runtime.db` of a root, whose state is below it.
fn open(path: &Path) -> Result<Database> {
    Database::open(&layout(path))
}

fn layout(path: &Path) -> FilesystemLayout {
    let root = path.parent().unwrap();
    FilesystemLayout::new(root, &root.join("state")).unwrap()
}

#[tokio::test]
async fn load_returns_rows_after_reopen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runtime.db");
    let first = box_row("a", "pod-a");
    let container = container_row("c1", "a");
    {
        let database = open(&path).unwrap();
        database.insert_box(first.clone()).await.unwrap();
        database.insert_box(box_row("b", "pod-b")).await.unwrap();
        database.put_container(container.clone()).await.unwrap();
        database
            .put_container(container_row("c2", "b"))
            .await
            .unwrap();
    }
    let database = open(&path).unwrap();
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
    let database = open(&directory.path().join("runtime.db")).unwrap();
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
    let database = open(&path).unwrap();
    database.insert_box(box_row("a", "pod")).await.unwrap();
    for entry in std::fs::read_dir(directory.path()).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_dir() {
            continue;
        }
        let mode = entry.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{:?}", entry.path());
    }
    database
        .locked("test", |inner| {
            inner.connection.pragma_update(None, "user_version", 99)
        })
        .await
        .unwrap();
    drop(database);
    let error = open(&path).unwrap_err();
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
    let database = open(&path).unwrap();
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

/// Runs SQL on a closed database.
fn sql(path: &Path, statements: &str) {
    Connection::open(path)
        .unwrap()
        .execute_batch(statements)
        .unwrap();
}

/// Creates two boxes with a container each, and closes the database.
async fn two_boxes(path: &Path) -> Vec<(BoxRow, Vec<ContainerRow>)> {
    let database = open(path).unwrap();
    for id in ["a", "b"] {
        database.insert_box(box_row(id, id)).await.unwrap();
        let container = container_row(&format!("c-{id}"), id);
        database.put_container(container).await.unwrap();
    }
    database.load().await.unwrap()
}

#[tokio::test]
async fn damaged_databases_and_rows_are_restored_from_copies() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage); 7] = [
        ("garbage", |path| std::fs::write(path, [7; 9000]).unwrap()),
        ("empty", |path| std::fs::write(path, "").unwrap()),
        ("gone", |path| std::fs::remove_file(path).unwrap()),
        ("a page", |path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[4096..].fill(0xa5);
            std::fs::write(path, bytes).unwrap();
        }),
        ("a box", |path| {
            sql(
                path,
                "UPDATE boxes SET record = replace(record, 'phase', 'fase') WHERE id = 'a'",
            );
        }),
        ("a container", |path| {
            sql(path, "UPDATE containers SET record = '' WHERE id = 'c-b'");
        }),
        ("all rows", |path| {
            sql(path, "PRAGMA foreign_keys=ON; DELETE FROM boxes")
        }),
    ];
    for (name, damage) in cases {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runtime.db");
        let expected = two_boxes(&path).await;
        damage(&path);
        let database = open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(database.load().await.unwrap(), expected, "{name}");
        assert!(database.quarantined() > 0, "{name}");
        drop(database);
        // Written again, not only remembered.
        std::fs::remove_dir_all(layout(&path).record_copies()).unwrap();
        let database = open(&path).unwrap();
        assert_eq!(database.load().await.unwrap(), expected, "{name}");
        assert_eq!(database.quarantined(), 0, "{name}");
    }
}

#[tokio::test]
async fn unreadable_row_without_copy_is_quarantined() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runtime.db");
    let expected = two_boxes(&path).await;
    std::fs::remove_dir_all(layout(&path).record_copies()).unwrap();
    sql(&path, "UPDATE boxes SET record = '{}' WHERE id = 'a'");
    let database = open(&path).unwrap();
    assert_eq!(database.load().await.unwrap(), expected[1..]);
    assert_eq!(database.quarantined(), 1);
    drop(database);
    let kept: i64 = Connection::open(&path)
        .unwrap()
        .query_row("SELECT count(*) FROM quarantine", [], |row| row.get(0))
        .unwrap();
    assert_eq!(kept, 2, "the box and its container");
}

#[tokio::test]
async fn deleted_rows_are_not_restored() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runtime.db");
    let expected = two_boxes(&path).await;
    let database = open(&path).unwrap();
    database.delete_box("a").await.unwrap();
    database.update_box(expected[0].0.clone()).await.unwrap();
    database.delete_container("c-b").await.unwrap();
    drop(database);
    std::fs::remove_file(&path).unwrap();
    let rows = open(&path).unwrap().load().await.unwrap();
    assert_eq!(rows, [(expected[1].0.clone(), Vec::new())]);
}

/// The tables and a row as version 1 wrote them.
const VERSION_1: &str = r#"
CREATE TABLE boxes (id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, record TEXT NOT NULL, metadata BLOB NOT NULL) STRICT;
CREATE TABLE containers (id TEXT PRIMARY KEY, box_id TEXT NOT NULL REFERENCES boxes(id) ON DELETE CASCADE,
    record TEXT NOT NULL, metadata BLOB NOT NULL) STRICT;
CREATE INDEX containers_of_box ON containers(box_id);
INSERT INTO boxes VALUES ('a', 'pod', '{"options":{"id":"a","name":"pod","metadata":[],"vcpus":1,"memory_mib":256,
    "scratch_bytes":1024,"hostname":"h","netns":null,"sysctls":{},"cgroup_parent":"","vmm":null,"debug_console":false},
    "phase":"NotReady","reason":"","created_at_ns":5,"shim":null,"timers":{"stages":[]}}', x'00ff');
PRAGMA user_version = 1;
"#;

#[tokio::test]
async fn open_migrates_version_1() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runtime.db");
    sql(&path, VERSION_1);
    let database = open(&path).unwrap();
    let rows = database.load().await.unwrap();
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(rows[0].0.options.metadata, [0, 255]);
    assert_eq!(database.quarantined(), 0);
    let version: i64 = database
        .locked("test", |inner| {
            inner
                .connection
                .query_row("PRAGMA user_version", [], |row| row.get(0))
        })
        .await
        .unwrap();
    assert_eq!(version, schema::SCHEMA_VERSION);
    // The migrated tables are complete.
    database.insert_box(box_row("b", "other")).await.unwrap();
    drop(database);
    sql(&path, "UPDATE boxes SET record = '' WHERE id = 'a'");
    assert_eq!(open(&path).unwrap().load().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bundle_is_removed_while_its_record_changes() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("runtime.db");
    let database = open(&path).unwrap();
    database.insert_box(box_row("a", "a")).await.unwrap();
    let bundle = layout(&path).bundle("a");
    for _ in 0..20 {
        std::fs::create_dir_all(bundle.join("c")).unwrap();
        let writer = database.clone();
        let writing = tokio::spawn(async move {
            loop {
                writer.update_box(box_row("a", "a")).await.unwrap();
            }
        });
        let record = bundle.join("record");
        while !record.exists() {
            assert!(!writing.is_finished(), "the writer failed");
            tokio::task::yield_now().await;
        }
        let removed = database.remove_bundle(bundle.clone()).await;
        writing.abort();
        removed.unwrap();
        assert!(!bundle.exists());
    }
}
