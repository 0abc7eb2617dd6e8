//! Opens the database file: its checks, its tables and their migration. A damaged file is set aside, never deleted.

use crate::error::{Result, RuntimeError};
use rusqlite::{Connection, ErrorCode, ffi};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Version of the tables, stored in `PRAGMA user_version`. A newer version is refused.
pub(super) const SCHEMA_VERSION: i64 = 2;
/// Timeout for the file lock. Only one process uses the file; this allows for a sqlite3 shell.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Suffix of a damaged database, behind the file's name. A later one replaces it.
const DAMAGED_SUFFIX: &str = ".damaged";

/// Statements from each version to the next, the first from an empty file.
const MIGRATIONS: [&str; SCHEMA_VERSION as usize] = [
    "CREATE TABLE boxes (
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
    CREATE INDEX containers_of_box ON containers(box_id);",
    "CREATE TABLE quarantine (
        kind TEXT NOT NULL,
        id TEXT NOT NULL,
        reason TEXT NOT NULL,
        record TEXT NOT NULL,
        metadata BLOB NOT NULL
    ) STRICT;",
];

/// Opens or creates the file (0600). Also returns whether a damaged one was set aside. Blocks.
///
/// # Errors
/// `Io`, `Database`, `DatabaseSchema` if a newer version wrote it.
pub(super) fn open(path: &Path) -> Result<(Connection, bool)> {
    match connect(path) {
        Err(RuntimeError::Database { source, .. }) if is_damaged(&source) => {
            set_aside(path)?;
            let to = with_suffix(path, DAMAGED_SUFFIX);
            tracing::error!(path = %path.display(), to = %to.display(), error = %source, "the database is damaged: set aside, starting a new one");
            connect(path).map(|connection| (connection, true))
        }
        result => result.map(|connection| (connection, false)),
    }
}

fn is_damaged(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt)
    )
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Renames the database with its WAL and index.
fn set_aside(path: &Path) -> Result<()> {
    for part in ["", "-wal", "-shm"] {
        let from = with_suffix(path, part);
        let to = with_suffix(path, &format!("{DAMAGED_SUFFIX}{part}"));
        match std::fs::rename(&from, to) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(RuntimeError::Io {
                    operation: "set aside",
                    path: from,
                    source,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn connect(path: &Path) -> Result<Connection> {
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
    check(&connection).map_err(wrap("check the file"))?;
    let found: i64 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(wrap("read the schema version"))?;
    let missing = usize::try_from(found)
        .ok()
        .and_then(|done| MIGRATIONS.get(done..))
        .ok_or_else(|| RuntimeError::DatabaseSchema {
            path: path.to_owned(),
            found,
            known: SCHEMA_VERSION,
        })?;
    if !missing.is_empty() {
        migrate(&mut connection, missing).map_err(wrap("migrate the tables"))?;
    }
    Ok(connection)
}

/// Fails if the pages of the file are inconsistent. The file has a few hundred rows.
fn check(connection: &Connection) -> rusqlite::Result<()> {
    let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    match found.as_str() {
        "ok" => Ok(()),
        _ => Err(rusqlite::Error::SqliteFailure(
            ffi::Error::new(ffi::SQLITE_CORRUPT),
            Some(found),
        )),
    }
}

fn migrate(connection: &mut Connection, statements: &[&str]) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for batch in statements {
        transaction.execute_batch(batch)?;
    }
    transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    transaction.commit()
}
