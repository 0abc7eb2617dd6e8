//! [`Copies`]: a file below `state` for each row, from which rows of a lost or damaged database are restored.
//!
//! Written after the row, deleted before it, so that a crash in between leaves at most a copy too few. Without `state`, after a
//! reboot, there are no running pods that the copies could save. Failures are logged only.

use super::Kind;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Name of an unfinished copy.
const UNFINISHED: &str = "new";

/// A row as it is stored: id, record and metadata.
pub(super) type Raw = (String, String, Vec<u8>);

/// The directory of the copies.
#[derive(Debug)]
pub(super) struct Copies(PathBuf);

impl Copies {
    /// Creates the directory (0700) if it does not exist.
    pub(super) fn new(directory: &Path) -> Self {
        let created = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory);
        if let Err(error) = created {
            tracing::warn!(path = %directory.display(), %error, "failed to create the directory of record copies");
        }
        Self(directory.to_owned())
    }

    fn path(&self, kind: Kind, id: &str) -> PathBuf {
        self.0.join(format!("{}-{id}", kind.name()))
    }

    /// Writes a copy: the record's line, then the metadata.
    pub(super) fn put(&self, kind: Kind, id: &str, record: &str, metadata: &[u8]) {
        let unfinished = self.0.join(UNFINISHED);
        let written = write(&unfinished, &[record.as_bytes(), b"\n", metadata])
            .and_then(|()| std::fs::rename(&unfinished, self.path(kind, id)));
        if let Err(error) = written {
            tracing::debug!(id, %error, "failed to write the copy of a record");
        }
    }

    /// Deletes a copy if it exists.
    pub(super) fn remove(&self, kind: Kind, id: &str) {
        match std::fs::remove_file(self.path(kind, id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(id, %error, "failed to delete the copy of a record");
            }
            _ => {}
        }
    }

    /// Returns all complete copies of a kind, ordered by id.
    pub(super) fn load(&self, kind: Kind) -> Vec<Raw> {
        let prefix = format!("{}-", kind.name());
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut copies: Vec<Raw> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let id = name.strip_prefix(&prefix)?.to_owned();
                let bytes = std::fs::read(entry.path()).ok()?;
                let end = bytes.iter().position(|&byte| byte == b'\n')?;
                let record = String::from_utf8(bytes[..end].to_vec()).ok()?;
                Some((id, record, bytes[end + 1..].to_vec()))
            })
            .collect();
        copies.sort();
        copies
    }
}

fn write(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    parts.iter().try_for_each(|part| file.write_all(part))
}
