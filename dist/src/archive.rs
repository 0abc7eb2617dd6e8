//! Reproducible tar archives: fixed order, owner, permissions and time.
//!
//! Does not decide about contents; [`crate::tree`] and [`crate::deb`] do.

use crate::error::{DistError, Result};
use crate::tree::{Entry, Kind};
use flate2::{Compression, GzBuilder};
use std::fs::File;
use std::io::{self, Write};
use tar::{Builder, EntryType, Header};

/// Returns the entries below `prefix` as a gzip-compressed archive.
pub(crate) fn gzip(entries: &[Entry], prefix: &str, epoch: u64) -> Result<Vec<u8>> {
    compressed(|builder| {
        directory(builder, prefix, epoch)?;
        for entry in entries {
            append(builder, entry, prefix, epoch)?;
        }
        Ok(())
    })
}

/// Returns an archive of files in memory, as `(name, content, mode)`.
pub(crate) fn gzip_of_files(files: &[(&str, &[u8], u32)], epoch: u64) -> Result<Vec<u8>> {
    compressed(|builder| {
        directory(builder, ".", epoch)?;
        for (name, content, mode) in files {
            let mut header = header(EntryType::Regular, *mode, epoch);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, *name, *content)?;
        }
        Ok(())
    })
}

fn compressed(
    fill: impl FnOnce(&mut Builder<flate2::write::GzEncoder<Vec<u8>>>) -> io::Result<()>,
) -> Result<Vec<u8>> {
    let failed = |source| DistError::Archive { source };
    // The header of gzip has no name and the time 0.
    let encoder = GzBuilder::new().write(Vec::new(), Compression::default());
    let mut builder = Builder::new(encoder);
    fill(&mut builder).map_err(failed)?;
    let encoder = builder.into_inner().map_err(failed)?;
    encoder.finish().map_err(failed)
}

fn header(kind: EntryType, mode: u32, epoch: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(epoch);
    header.set_size(0);
    header
}

fn directory<W: Write>(builder: &mut Builder<W>, path: &str, epoch: u64) -> io::Result<()> {
    let mut header = header(EntryType::Directory, 0o755, epoch);
    builder.append_data(&mut header, format!("{path}/"), io::empty())
}

fn append<W: Write>(
    builder: &mut Builder<W>,
    entry: &Entry,
    prefix: &str,
    epoch: u64,
) -> io::Result<()> {
    let path = format!("{prefix}/{}", entry.path);
    match &entry.kind {
        Kind::Directory => directory(builder, &path, epoch),
        Kind::Link { target } => {
            let mut header = header(EntryType::Symlink, 0o777, epoch);
            builder.append_link(&mut header, path, target)
        }
        Kind::File { source, executable } => {
            let file = File::open(source)?;
            let mut header = header(
                EntryType::Regular,
                if *executable { 0o755 } else { 0o644 },
                epoch,
            );
            header.set_size(file.metadata()?.len());
            builder.append_data(&mut header, path, file)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree;
    use std::fs;
    use std::path::Path;

    fn staged(root: &Path, files: &[&str]) {
        for file in files {
            let path = root.join(file);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            fs::write(path, file).expect("a file");
        }
    }

    #[test]
    fn gzip_of_equal_trees_is_equal() {
        let (one, two) = (tempfile::tempdir(), tempfile::tempdir());
        let (one, two) = (one.expect("a directory"), two.expect("a directory"));
        staged(one.path(), &["usr/bin/a", "etc/b"]);
        staged(two.path(), &["etc/b", "usr/bin/a"]);
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
        File::open(one.path().join("etc/b"))
            .and_then(|f| f.set_modified(old))
            .expect("a time");
        let pack = |root: &Path| {
            gzip(&tree::read(root).expect("a tree"), ".", 1_700_000_000).expect("an archive")
        };
        assert_eq!(pack(one.path()), pack(two.path()));
    }

    #[test]
    fn gzip_entries_have_prefix_owner_and_time() {
        let dir = tempfile::tempdir().expect("a directory");
        staged(dir.path(), &["usr/bin/a"]);
        let bytes = gzip(&tree::read(dir.path()).expect("a tree"), "top", 42).expect("an archive");
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(&bytes[..]));
        let mut names = Vec::new();
        for entry in archive.entries().expect("entries") {
            let entry = entry.expect("an entry");
            assert_eq!(entry.header().uid().expect("a uid"), 0);
            assert_eq!(entry.header().mtime().expect("a time"), 42);
            names.push(entry.path().expect("a path").display().to_string());
        }
        assert_eq!(names, ["top/", "top/usr/", "top/usr/bin/", "top/usr/bin/a"]);
    }
}
