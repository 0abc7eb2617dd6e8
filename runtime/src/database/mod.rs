//! [`Database`]: persistent state of boxes and containers, in SQLite at `root/runtime.db`.
//!
//! A box's row is written before its shim is spawned, and only by the box's driver. No policy and no cache: the drivers
//! hold the live state. WAL with synchronous=NORMAL survives `kill -9` at any point; a power cut may lose the last
//! writes, but it ends all VMs as well.
//!
//! Deleting works on a full disk: a reserve file is removed to make room, and a deletion that still cannot be written is
//! deferred until the next write. A restart before that finds the row again, without a shim.
//!
//! A damaged file or row does not stop the daemon, and no running pod is lost with it: [`Copies`] in `state` restore the rows,
//! one in a directory for all rows, another in the bundle of the pod or container.
//!
//! Each call runs on a blocking thread; dropping its future does not cancel the write.

mod copies;
mod load;
mod schema;

use crate::box_state::Phase;
use crate::error::{Result, RuntimeError};
use crate::failpoint;
use crate::filesystem_layout::{FilesystemLayout, remove_tree};
use crate::metrics::StageTimers;
use crate::shim_controller::ShimState;
use crate::types::{BoxOptions, ContainerSnapshot};
use boxlite_sys::sync::Mutex;
use copies::Copies;
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Size of the reserve file, which makes room for deletions on a full disk.
const RESERVE_BYTES: usize = 1 << 20;

/// Kind of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Box,
    Container,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Box => "box",
            Self::Container => "container",
        }
    }

    fn table(self) -> &'static str {
        match self {
            Self::Box => "boxes",
            Self::Container => "containers",
        }
    }
}

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

/// A stored row with its bundle, which may not exist.
#[derive(Debug)]
struct Stored {
    kind: Kind,
    id: String,
    record: String,
    metadata: Vec<u8>,
    bundle: PathBuf,
}

/// Handle to the database. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    inner: Arc<Mutex<Inner>>,
    layout: FilesystemLayout,
}

#[derive(Debug)]
struct Inner {
    connection: Connection,
    reserve: PathBuf,
    /// Deletions that could not be written yet.
    deferred: Vec<Deletion>,
    copies: Copies,
    /// Number of records and files that were damaged at the start.
    quarantined: u64,
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
    /// Opens or creates the file (0600) and the directory of the copies. A damaged file is set aside. Blocks.
    ///
    /// # Errors
    /// `Io`, `Database`, `DatabaseSchema` if a newer version wrote it.
    pub(crate) fn open(layout: &FilesystemLayout) -> Result<Self> {
        let path = layout.database();
        let (connection, damaged) = schema::open(&path)?;
        let mut inner = Inner {
            connection,
            reserve: path.with_extension("reserve"),
            deferred: Vec::new(),
            copies: Copies::new(layout.clone()),
            quarantined: u64::from(damaged),
        };
        inner.catch_up();
        Ok(Self {
            inner: Arc::new(Mutex::new(inner)),
            layout: layout.clone(),
        })
    }

    /// Returns the number of records and files that were damaged when they were read.
    pub(crate) fn quarantined(&self) -> u64 {
        self.inner.lock().quarantined
    }

    /// Writes a row, then its copy.
    async fn write(
        &self,
        what: &'static str,
        row: Stored,
        query: impl FnOnce(&Connection, &Stored) -> rusqlite::Result<usize> + Send + 'static,
    ) -> Result<()> {
        failpoint::reach("database.write").await?;
        self.locked(what, move |inner| {
            inner.catch_up();
            // An update of a deleted row changes nothing; its copy would restore the row.
            if query(&inner.connection, &row)? > 0 && failpoint::hit("database.copy").is_ok() {
                inner.copies.put(&row);
            }
            Ok(())
        })
        .await
    }

    async fn locked<T: Send + 'static>(
        &self,
        what: &'static str,
        query: impl FnOnce(&mut Inner) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = self.inner.clone();
        let path = self.layout.database();
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
        let insert = move |connection: &Connection, row: &Stored| {
            connection.execute(
                "INSERT INTO boxes (id, name, record, metadata) VALUES (?1, ?2, ?3, ?4)",
                params![row.id, name, row.record, row.metadata],
            )
        };
        let row = self.stored_box(id, record, metadata);
        self.write("insert a pod sandbox", row, insert).await
    }

    /// Updates a box; its id and name are immutable.
    ///
    /// # Errors
    /// `Database`.
    pub(crate) async fn update_box(&self, row: BoxRow) -> Result<()> {
        let (id, _, record, metadata) = split_box(row)?;
        let update = |connection: &Connection, row: &Stored| {
            connection.execute(
                "UPDATE boxes SET record = ?2, metadata = ?3 WHERE id = ?1",
                params![row.id, row.record, row.metadata],
            )
        };
        let row = self.stored_box(id, record, metadata);
        self.write("update a pod sandbox", row, update).await
    }

    fn stored_box(&self, id: String, record: String, metadata: Vec<u8>) -> Stored {
        Stored {
            kind: Kind::Box,
            bundle: self.layout.bundle(&id),
            id,
            record,
            metadata,
        }
    }

    /// Deletes a box with its containers; idempotent.
    ///
    /// # Errors
    /// `Database`.
    pub(crate) async fn delete_box(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        failpoint::reach("database.delete").await?;
        self.locked("delete a pod sandbox", move |inner| {
            for container in containers_of(&inner.connection, &id).unwrap_or_default() {
                inner.copies.remove_container(&container);
            }
            inner.copies.remove_box(&id);
            inner.delete(Deletion::Box(id))
        })
        .await?;
        Ok(failpoint::reach("database.deleted").await?)
    }

    /// Inserts or updates a container.
    ///
    /// # Errors
    /// `Database`, also if its box does not exist.
    pub(crate) async fn put_container(&self, row: ContainerRow) -> Result<()> {
        let (id, box_id, record, metadata) = split_container(row)?;
        let row = Stored {
            kind: Kind::Container,
            bundle: self.layout.container_bundle(&box_id, &id),
            id,
            record,
            metadata,
        };
        let put = move |connection: &Connection, row: &Stored| {
            connection.execute(
                PUT_CONTAINER,
                params![row.id, box_id, row.record, row.metadata],
            )
        };
        self.write("write a container", row, put).await
    }

    /// Deletes a container; idempotent.
    ///
    /// # Errors
    /// `Database`.
    pub(crate) async fn delete_container(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        failpoint::reach("database.delete").await?;
        self.locked("delete a container", move |inner| {
            inner.copies.remove_container(&id);
            inner.delete(Deletion::Container(id))
        })
        .await?;
        Ok(failpoint::reach("database.deleted").await?)
    }

    /// Removes the bundle of a box or container whose row remains, with the copies in it; idempotent. No copy is written
    /// meanwhile: a new file in a directory that is being removed makes that fail.
    ///
    /// # Errors
    /// `Io`.
    pub(crate) async fn remove_bundle(&self, bundle: PathBuf) -> Result<()> {
        self.locked("remove a bundle", move |_| Ok(remove_tree(&bundle)))
            .await?
    }

    /// Loads all boxes with their containers. Unreadable rows are moved to the quarantine; rows that only have a copy are
    /// restored.
    ///
    /// # Errors
    /// `Database`.
    pub(crate) async fn load(&self) -> Result<Vec<(BoxRow, Vec<ContainerRow>)>> {
        self.locked("read all boxes", |inner| {
            inner.catch_up();
            inner.load()
        })
        .await
    }
}

/// Inserts or updates a container.
const PUT_CONTAINER: &str =
    "INSERT INTO containers (id, box_id, record, metadata) VALUES (?1, ?2, ?3, ?4)
     ON CONFLICT (id) DO UPDATE SET record = excluded.record, metadata = excluded.metadata";

fn containers_of(connection: &Connection, box_id: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare("SELECT id FROM containers WHERE box_id = ?1")?;
    let rows = statement.query_map([box_id], |row| row.get(0))?;
    rows.collect()
}

fn split_box(mut row: BoxRow) -> Result<(String, String, String, Vec<u8>)> {
    let metadata = std::mem::take(&mut row.options.metadata);
    let record = to_json(&row)?;
    Ok((row.options.id, row.options.name, record, metadata))
}

fn split_container(mut row: ContainerRow) -> Result<(String, String, String, Vec<u8>)> {
    let metadata = std::mem::take(&mut row.snapshot.metadata);
    let record = to_json(&row)?;
    Ok((row.snapshot.id, row.snapshot.box_id, record, metadata))
}

fn to_json(row: &impl Serialize) -> Result<String> {
    serde_json::to_string(row).map_err(|error| RuntimeError::Internal {
        detail: format!("failed to encode a database record: {error}"),
    })
}

#[cfg(test)]
mod tests;
