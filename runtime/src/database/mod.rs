//! [`Database`]: persistent state of boxes and containers, in SQLite at `root/runtime.db`.
//!
//! A box's row is written before its shim is spawned, and only by the box's driver. No policy and no cache: the drivers
//! hold the live state. WAL with synchronous=NORMAL survives `kill -9` at any point; a power cut may lose the last
//! writes, but it ends all VMs as well.
//!
//! Deleting works on a full disk: a reserve file is removed to make room, and a deletion that still cannot be written is
//! deferred until the next write. A restart before that finds the row again, without a shim.
//!
//! Each call runs on a blocking thread; dropping its future does not cancel the write.

use crate::box_state::Phase;
use crate::error::{Result, RuntimeError};
use crate::metrics::StageTimers;
use crate::shim_controller::ShimState;
use crate::types::{BoxOptions, ContainerSnapshot};
use boxlite_sys::sync::Mutex;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Version of the tables, stored in `PRAGMA user_version`. A newer version is refused.
const SCHEMA_VERSION: i64 = 1;
/// Timeout for the file lock. Only one process uses the file; this allows for a sqlite3 shell.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Size of the reserve file, which makes room for deletions on a full disk.
const RESERVE_BYTES: usize = 1 << 20;

const TABLES: &str = "
CREATE TABLE boxes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    record TEXT NOT NULL,
    metadata BLOB NOT NULL
) STRICT;
CREATE TABLE containers (
    id TEXT PRIMARY KEY,
    box_id TEXT NOT NULL REFERENCES boxes(id) ON DELETE CASCADE,
    record TEXT NOT NULL,
    metadata BLOB NOT NULL
) STRICT;
CREATE INDEX containers_of_box ON containers(box_id);
";

/// Row of a box.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BoxRow {
    /// Options; the metadata is stored in a separate column.
    pub options: BoxOptions,
    /// Phase of the state machine.
    pub phase: Phase,
    /// Reason of the phase.
    pub reason: String,
    /// Creation time in ns since the epoch.
    pub created_at_ns: i64,
    /// The shim, once spawned.
    pub shim: Option<ShimState>,
    /// Stage timers of the last start.
    pub timers: StageTimers,
}

/// Row of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerRow {
    /// Last known state; the metadata is stored in a separate column.
    pub snapshot: ContainerSnapshot,
    /// True once the creation has completed.
    pub complete: bool,
    /// True if the OOM killer killed a process of the container.
    pub oom: bool,
}

/// Handle to the database. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    inner: Arc<Mutex<Inner>>,
    path: PathBuf,
}

#[derive(Debug)]
struct Inner {
    connection: Connection,
    reserve: PathBuf,
    /// Deletions that could not be written yet.
    deferred: Vec<Deletion>,
}

/// A row to delete.
#[derive(Debug, Clone)]
enum Deletion {
    Box(String),
    Container(String),
}

impl Deletion {
    fn apply(&self, connection: &Connection) -> rusqlite::Result<usize> {
        match self {
            Self::Box(id) => connection.execute("DELETE FROM boxes WHERE id = ?1", params![id]),
            Self::Container(id) => {
                connection.execute("DELETE FROM containers WHERE id = ?1", params![id])
            }
        }
    }
}

impl Inner {
    /// Applies deferred deletions and restores the reserve, as far as there is room.
    fn catch_up(&mut self) {
        while let Some(deletion) = self.deferred.last() {
            if deletion.apply(&self.connection).is_err() {
                return;
            }
            self.deferred.pop();
        }
        if !self.reserve.exists()
            && let Err(error) = write_reserve(&self.reserve)
        {
            tracing::debug!(%error, "failed to write the reserve of the database");
            let _ = std::fs::remove_file(&self.reserve);
        }
    }

    /// Deletes a row, or defers that if the disk is full or read-only.
    fn delete(&mut self, deletion: Deletion) -> rusqlite::Result<()> {
        let mut result = deletion.apply(&self.connection);
        if result.as_ref().is_err_and(cannot_write) {
            let _ = std::fs::remove_file(&self.reserve);
            result = deletion.apply(&self.connection);
        }
        match result {
            Err(error) if cannot_write(&error) => {
                tracing::error!(?deletion, %error, "failed to delete a record, deferring it");
                self.deferred.push(deletion);
                Ok(())
            }
            result => result.map(drop),
        }
    }
}

fn write_reserve(path: &Path) -> std::io::Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&vec![0; RESERVE_BYTES])
}

/// Returns true if the cause is the disk and not the statement.
fn cannot_write(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode as Code;
    matches!(
        error.sqlite_error_code(),
        Some(Code::DiskFull | Code::SystemIoFailure | Code::ReadOnly | Code::CannotOpen)
    )
}

impl Database {
    /// Opens or creates the file (0600). Blocks.
    ///
    /// # Errors
    /// `Io`, `Database`, `DatabaseSchema` if a newer version wrote it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        // Created here because SQLite gives its WAL the mode of the database file.
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| file.set_permissions(std::fs::Permissions::from_mode(0o600)));
        file.map_err(|source| RuntimeError::Io {
            operation: "open",
            path: path.to_owned(),
            source,
        })?;
        let wrap = |what| {
            move |source| RuntimeError::Database {
                path: path.to_owned(),
                operation: what,
                source,
            }
        };
        let mut connection = Connection::open(path).map_err(wrap("open a connection"))?;
        connection
            .busy_timeout(BUSY_TIMEOUT)
            .map_err(wrap("set pragmas"))?;
        connection
            .execute_batch(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON;",
            )
            .map_err(wrap("set pragmas"))?;
        let found: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(wrap("read the schema version"))?;
        match found {
            SCHEMA_VERSION => {}
            0 => {
                let transaction = connection.transaction().map_err(wrap("create tables"))?;
                transaction
                    .execute_batch(TABLES)
                    .map_err(wrap("create tables"))?;
                transaction
                    .pragma_update(None, "user_version", SCHEMA_VERSION)
                    .map_err(wrap("create tables"))?;
                transaction.commit().map_err(wrap("create tables"))?;
            }
            _ => {
                return Err(RuntimeError::DatabaseSchema {
                    path: path.to_owned(),
                    found,
                    known: SCHEMA_VERSION,
                });
            }
        }
        let mut inner = Inner {
            connection,
            reserve: path.with_extension("reserve"),
            deferred: Vec::new(),
        };
        inner.catch_up();
        Ok(Self {
            inner: Arc::new(Mutex::new(inner)),
            path: path.to_owned(),
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        query: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        self.locked(what, |inner| {
            inner.catch_up();
            query(&mut inner.connection)
        })
        .await
    }

    async fn locked<T: Send + 'static>(
        &self,
        what: &'static str,
        query: impl FnOnce(&mut Inner) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.inner.clone();
        let path = self.path.clone();
        let joined = tokio::task::spawn_blocking(move || {
            // After a panic under the lock, a transaction was rolled back by its drop.
            let mut inner = inner.lock();
            query(&mut inner)
        })
        .await;
        match joined {
            Ok(result) => result.map_err(|source| RuntimeError::Database {
                path,
                operation: what,
                source,
            }),
            Err(error) => Err(RuntimeError::Internal {
                detail: format!("database task failed: {error}"),
            }),
        }
    }

    /// Inserts a box.
    ///
    /// # Errors
    /// `Database`, also if the id or name exists.
    pub(crate) async fn insert_box(&self, row: BoxRow) -> Result<()> {
        let (id, name, record, metadata) = split_box(row)?;
        self.run("insert a box", move |connection| {
            connection.execute(
                "INSERT INTO boxes (id, name, record, metadata) VALUES (?1, ?2, ?3, ?4)",
                params![id, name, record, metadata],
            )
        })
        .await
        .map(drop)
    }

    /// Updates a box; its id and name are immutable.
    ///
    /// # Errors
    /// `Database`.
    pub(crate) async fn update_box(&self, row: BoxRow) -> Result<()> {
        let (id, _, record, metadata) = split_box(row)?;
        self.run("update a box", move |connection| {
            connection.execute(
                "UPDATE boxes SET record = ?2, metadata = ?3 WHERE id = ?1",
                params![id, record, metadata],
            )
        })
        .await
        .map(drop)
    }

    /// Deletes a box with its containers; idempotent.
    ///
    /// # Errors
    /// `Database`.
    pub(crate) async fn delete_box(&self, id: &str) -> Result<()> {
        let deletion = Deletion::Box(id.to_owned());
        self.locked("delete a box", |inner| inner.delete(deletion))
            .await
    }

    /// Inserts or updates a container.
    ///
    /// # Errors
    /// `Database`, also if its box does not exist.
    pub(crate) async fn put_container(&self, mut row: ContainerRow) -> Result<()> {
        let metadata = std::mem::take(&mut row.snapshot.metadata);
        let record = to_json(&row)?;
        self.run("write a container", move |connection| {
            connection.execute(
                "INSERT INTO containers (id, box_id, record, metadata) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO UPDATE SET record = excluded.record, metadata = excluded.metadata",
                params![row.snapshot.id, row.snapshot.box_id, record, metadata],
            )
        })
        .await
        .map(drop)
    }

    /// Deletes a container; idempotent.
    ///
    /// # Errors
    /// `Database`.
    pub(crate) async fn delete_container(&self, id: &str) -> Result<()> {
        let deletion = Deletion::Container(id.to_owned());
        self.locked("delete a container", |inner| inner.delete(deletion))
            .await
    }

    /// Loads all boxes with their containers.
    ///
    /// # Errors
    /// `Database`; `Internal` if a record is not valid.
    pub(crate) async fn load(&self) -> Result<Vec<(BoxRow, Vec<ContainerRow>)>> {
        let (boxes, containers) = self
            .run("read all boxes", |connection| {
                let boxes = read_all(connection, "SELECT record, metadata FROM boxes ORDER BY id")?;
                let containers = read_all(
                    connection,
                    "SELECT record, metadata FROM containers ORDER BY id",
                )?;
                Ok((boxes, containers))
            })
            .await?;
        let mut containers: Vec<ContainerRow> = containers
            .into_iter()
            .map(|(record, metadata)| {
                let mut row: ContainerRow = from_json(&record)?;
                row.snapshot.metadata = metadata;
                Ok(row)
            })
            .collect::<Result<_>>()?;
        boxes
            .into_iter()
            .map(|(record, metadata)| {
                let mut row: BoxRow = from_json(&record)?;
                row.options.metadata = metadata;
                let (own, others) = containers
                    .drain(..)
                    .partition(|container| container.snapshot.box_id == row.options.id);
                containers = others;
                Ok((row, own))
            })
            .collect()
    }
}

fn read_all(connection: &Connection, query: &str) -> rusqlite::Result<Vec<(String, Vec<u8>)>> {
    let mut statement = connection.prepare(query)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    rows.collect()
}

fn split_box(mut row: BoxRow) -> Result<(String, String, String, Vec<u8>)> {
    let metadata = std::mem::take(&mut row.options.metadata);
    let record = to_json(&row)?;
    Ok((row.options.id, row.options.name, record, metadata))
}

fn to_json(row: &impl Serialize) -> Result<String> {
    serde_json::to_string(row).map_err(|error| RuntimeError::Internal {
        detail: format!("failed to encode a database record: {error}"),
    })
}

fn from_json<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| RuntimeError::Internal {
        detail: format!("invalid database record: {error}"),
    })
}

#[cfg(test)]
mod tests;
