//! [`Copies`]: two files below `state` for each row, from which rows of a lost or damaged database are restored: one in the
//! directory of all copies, and one in the bundle, while there is one. A running pod has a bundle, so that it is adopted even if
//! database and directory are lost.
//!
//! Written after the row, deleted before it, so that a crash in between leaves at most a copy too few; a bundle is removed before
//! its row, too. Without `state`, after a reboot, there are no running pods that the copies could save. Failures are logged only.

use super::{Kind, Stored};
use crate::filesystem_layout::FilesystemLayout;
use boxlite_sys::replace_file::replace;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Name of an unfinished copy.
const UNFINISHED: &str = "new";
/// Name of a copy in a bundle, and of an unfinished one.
const IN_BUNDLE: [&str; 2] = ["record", "record.new"];

/// A stored row: id, record and metadata.
pub(super) type Raw = (String, String, Vec<u8>);

/// The copies of all rows.
#[derive(Debug)]
pub(super) struct Copies(FilesystemLayout);

impl Copies {
    /// Creates the directory (0700) if it does not exist.
    pub(super) fn new(layout: FilesystemLayout) -> Self {
        let directory = layout.record_copies();
        let created = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory);
        if let Err(error) = created {
            tracing::warn!(path = %directory.display(), %error, "failed to create the directory of record copies");
        }
        Self(layout)
    }

    fn path(&self, kind: Kind, id: &str) -> PathBuf {
        self.0.record_copies().join(format!("{}-{id}", kind.name()))
    }

    /// Writes the copies: the record's line, then the metadata.
    pub(super) fn put(&self, row: &Stored) {
        let copy = [row.record.as_bytes(), b"\n", &row.metadata].concat();
        let unfinished = self.0.record_copies().join(UNFINISHED);
        let mut written = replace(&self.path(row.kind, &row.id), &unfinished, &copy);
        if row.bundle.is_dir() {
            let [name, unfinished] = IN_BUNDLE.map(|name| row.bundle.join(name));
            written = written.and(replace(&name, &unfinished, &copy));
        }
        if let Err(error) = written {
            tracing::debug!(id = row.id, %error, "failed to write the copy of a record");
        }
    }

    /// Deletes the copies of a box. Those of its containers in their bundles have no effect without it.
    pub(super) fn remove_box(&self, id: &str) {
        delete(id, &self.path(Kind::Box, id));
        delete(id, &self.0.bundle(id).join(IN_BUNDLE[0]));
    }

    /// Deletes the copy of a container whose bundle is removed.
    pub(super) fn remove_container(&self, id: &str) {
        delete(id, &self.path(Kind::Container, id));
    }

    /// Returns all complete copies of a kind, ordered by id, those in bundles last.
    pub(super) fn load(&self, kind: Kind) -> Vec<Raw> {
        let prefix = format!("{}-", kind.name());
        let mut copies: Vec<Raw> = entries(&self.0.record_copies())
            .filter_map(|(name, path)| read(name.strip_prefix(&prefix)?.to_owned(), &path))
            .collect();
        copies.sort();
        let boxes = entries(&self.0.boxes());
        let in_bundle = |(id, bundle): (String, PathBuf)| read(id, &bundle.join(IN_BUNDLE[0]));
        let mut others: Vec<Raw> = match kind {
            Kind::Box => boxes.filter_map(in_bundle).collect(),
            Kind::Container => boxes
                .flat_map(|(id, _)| entries(&self.0.containers(&id)))
                .filter_map(in_bundle)
                .collect(),
        };
        others.sort();
        copies.append(&mut others);
        copies
    }
}

/// Returns names and paths in a directory.
fn entries(directory: &Path) -> impl Iterator<Item = (String, PathBuf)> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
}

fn read(id: String, path: &Path) -> Option<Raw> {
    let bytes = std::fs::read(path).ok()?;
    let end = bytes.iter().position(|&byte| byte == b'\n')?;
    let record = String::from_utf8(bytes[..end].to_vec()).ok()?;
    Some((id, record, bytes[end + 1..].to_vec()))
}

fn delete(id: &str, path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(id, %error, "failed to delete the copy of a record");
        }
        _ => {}
    }
}
