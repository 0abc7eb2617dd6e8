//! [`Database`]: what is needed to find boxes and containers again, in SQLite at `root/runtime.db`.
//!
//! Rows are written before the shim they speak of is spawned, and by one task per box (its driver). No policy here,
//! no cache: the drivers hold the live state. WAL with synchronous=NORMAL: survives `kill -9` at any line; a power
//! cut may lose the last writes, and with them every VM.
//!
//! Each call runs on a blocking thread; dropping its future does not take the write back.

use crate::error::{Result, RuntimeError};
use crate::management::box_state::Phase;
use crate::metrics::StageTimers;
use crate::shim_controller::ShimRecord;
use crate::types::{BoxOptions, ContainerSnapshot};
use boxlite_sys::sync::Mutex;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Version of the tables, in `PRAGMA user_version`. Older ones are brought up, newer ones refused.
const SCHEMA: i64 = 1;
/// How long a statement waits for a lock. Only one process uses the file; this is for a sqlite3 shell beside it.
const BUSY_LIMIT: Duration = Duration::from_secs(5);

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

/// A box's row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxRow {
    /// As created; its metadata is a column of its own.
    pub options: BoxOptions,
    /// Where the state machine stood.
    pub phase: Phase,
    /// Why it stood there.
    pub reason: String,
    /// ns since the epoch.
    pub created_at_ns: i64,
    /// The shim, once spawned.
    pub shim: Option<ShimRecord>,
    /// Of the last start.
    pub timers: StageTimers,
}

/// A container's row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerRow {
    /// State as last known; its metadata is a column of its own.
    pub snapshot: ContainerSnapshot,
    /// Whether Create was carried out. A row without it is half a container.
    pub complete: bool,
    /// Whether the kernel killed a process of it for want of memory.
    pub oom: bool,
}

/// The database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Database {
    connection: Arc<Mutex<Connection>>,
    path: PathBuf,
}

impl Database {
    /// Opens or makes the file (0600). Blocking.
    ///
    /// # Errors
    /// `Io`, `Database`, `DatabaseSchema` where a newer version wrote it.
    pub fn open(path: &Path) -> Result<Self> {
        // Made by hand first: SQLite gives its WAL the mode of the database.
        let file = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .and_then(|file| file.set_permissions(std::fs::Permissions::from_mode(0o600)));
        file.map_err(|source| RuntimeError::Io {
            what: "cannot open",
            path: path.to_owned(),
            source,
        })?;
        let wrap = |what| {
            move |source| RuntimeError::Database {
                path: path.to_owned(),
                what,
                source,
            }
        };
        let mut connection = Connection::open(path).map_err(wrap("open"))?;
        connection
            .busy_timeout(BUSY_LIMIT)
            .map_err(wrap("set up"))?;
        connection
            .execute_batch(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON;",
            )
            .map_err(wrap("set up"))?;
        let found: i64 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(wrap("read the schema of"))?;
        match found {
            SCHEMA => {}
            0 => {
                let transaction = connection.transaction().map_err(wrap("make tables in"))?;
                transaction
                    .execute_batch(TABLES)
                    .map_err(wrap("make tables in"))?;
                transaction
                    .pragma_update(None, "user_version", SCHEMA)
                    .map_err(wrap("make tables in"))?;
                transaction.commit().map_err(wrap("make tables in"))?;
            }
            _ => {
                return Err(RuntimeError::DatabaseSchema {
                    path: path.to_owned(),
                    found,
                    known: SCHEMA,
                });
            }
        }
        Ok(Self {
            connection: Arc::new(Mutex::new(connection)),
            path: path.to_owned(),
        })
    }

    async fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let connection = self.connection.clone();
        let path = self.path.clone();
        let joined = tokio::task::spawn_blocking(move || {
            // A panic under the lock left at most an open transaction, and that was rolled back by its drop.
            let mut connection = connection.lock();
            work(&mut connection)
        })
        .await;
        match joined {
            Ok(result) => result.map_err(|source| RuntimeError::Database { path, what, source }),
            Err(error) => Err(RuntimeError::Internal {
                what: format!("database thread: {error}"),
            }),
        }
    }

    /// Adds a box.
    ///
    /// # Errors
    /// `Database`; a second row of an id or name is one.
    pub async fn insert_box(&self, row: BoxRow) -> Result<()> {
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

    /// Writes a box anew; its id and name never change.
    ///
    /// # Errors
    /// `Database`.
    pub async fn update_box(&self, row: BoxRow) -> Result<()> {
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

    /// Removes a box with its containers; succeeds where there is none.
    ///
    /// # Errors
    /// `Database`.
    pub async fn delete_box(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        self.run("delete a box", move |connection| {
            connection.execute("DELETE FROM boxes WHERE id = ?1", params![id])
        })
        .await
        .map(drop)
    }

    /// Adds or rewrites a container.
    ///
    /// # Errors
    /// `Database`; a container without its box is one.
    pub async fn put_container(&self, mut row: ContainerRow) -> Result<()> {
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

    /// Removes a container; succeeds where there is none.
    ///
    /// # Errors
    /// `Database`.
    pub async fn delete_container(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        self.run("delete a container", move |connection| {
            connection.execute("DELETE FROM containers WHERE id = ?1", params![id])
        })
        .await
        .map(drop)
    }

    /// Everything, each box with its containers.
    ///
    /// # Errors
    /// `Database`; `Internal` on a record that is not JSON of ours.
    pub async fn load(&self) -> Result<Vec<(BoxRow, Vec<ContainerRow>)>> {
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
        what: format!("a row that cannot be written: {error}"),
    })
}

fn from_json<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| RuntimeError::Internal {
        what: format!("a database record that cannot be read: {error}"),
    })
}

#[cfg(test)]
mod tests;
