//! `boxlite-e2e tree <directory>`: prints a tree as the running kernel sees it, one JSON line per entry.
//!
//! Runs inside a guest, mounted as a volume, because busybox can print neither extended attributes nor nanoseconds.
//! [`crate::image::tree`] compares the output with its model.

use crate::failure::{During, Result};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// An entry of a tree. Names, targets and values are in hex, since they may be any bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Path relative to the listed directory, which itself is "".
    pub path: String,
    /// Type and permission bits.
    pub mode: u32,
    /// User and group.
    pub owner: (u32, u32),
    /// Seconds and nanoseconds since the epoch.
    pub mtime: (i64, i64),
    /// Size of a regular file.
    pub size: u64,
    /// SHA-256 of a regular file's content, target of a symbolic link in hex, or major and minor number of a device.
    pub content: String,
    /// Extended attributes, except those added by the file systems themselves.
    pub xattrs: BTreeMap<String, String>,
    /// First path, in byte order, with the same inode.
    pub first: String,
}

/// Maximum size of an extended attribute's value and of the list of names: the kernel's limit.
const MAX_XATTR_BYTES: usize = 64 << 10;

/// Prints the tree at `root`.
pub(crate) fn run(root: &Path) -> Result {
    let mut paths = Vec::new();
    walk(root, Vec::new(), &mut paths)?;
    paths.sort();
    let mut inodes = HashMap::new();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    for path in &paths {
        let entry = entry(root, path, &mut inodes).during(root.join(os(path)).display())?;
        serde_json::to_writer(&mut out, &entry)?;
        out.write_all(b"\n")?;
    }
    Ok(out.flush()?)
}

fn os(path: &[u8]) -> OsString {
    OsString::from_vec(path.to_vec())
}

fn walk(root: &Path, path: Vec<u8>, found: &mut Vec<Vec<u8>>) -> Result {
    let at = root.join(os(&path));
    if at.symlink_metadata()?.is_dir() {
        for entry in at.read_dir().during(at.display())? {
            let mut below = path.clone();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend(entry?.file_name().as_bytes());
            walk(root, below, found)?;
        }
    }
    found.push(path);
    Ok(())
}

fn entry(root: &Path, path: &[u8], inodes: &mut HashMap<(u64, u64), String>) -> Result<Entry> {
    // Joining an empty path would add a slash, so that a link would be followed.
    let at = if path.is_empty() {
        root.to_owned()
    } else {
        root.join(os(path))
    };
    let meta = at.symlink_metadata()?;
    let kind = meta.file_type();
    let name = hex::encode(path);
    let content = if kind.is_file() {
        let mut file = std::fs::File::open(&at)?;
        let mut hash = <sha2::Sha256 as sha2::Digest>::new();
        std::io::copy(&mut file, &mut hash)?;
        hex::encode(sha2::Digest::finalize(hash))
    } else if kind.is_symlink() {
        hex::encode(at.read_link()?.as_os_str().as_bytes())
    } else {
        device(&meta)
    };
    Ok(Entry {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        size: if kind.is_file() { meta.len() } else { 0 },
        content,
        xattrs: xattrs(&at)?,
        first: inodes
            .entry((meta.dev(), meta.ino()))
            .or_insert_with(|| name.clone())
            .clone(),
        path: name,
    })
}

/// Returns "major:minor", or an empty string for other files.
fn device(meta: &std::fs::Metadata) -> String {
    use std::os::unix::fs::FileTypeExt;
    let kind = meta.file_type();
    if !kind.is_char_device() && !kind.is_block_device() {
        return String::new();
    }
    let number = meta.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    format!("{major}:{minor}")
}

fn xattrs(at: &Path) -> Result<BTreeMap<String, String>> {
    let mut names = vec![0; MAX_XATTR_BYTES];
    let length = rustix::fs::llistxattr(at, &mut names)?;
    let mut found = BTreeMap::new();
    for name in names[..length].split(|byte| *byte == 0) {
        let Ok(name) = std::str::from_utf8(name) else {
            crate::bail!("invalid attribute name: {name:?}")
        };
        if !name.is_empty() {
            let mut value = vec![0; MAX_XATTR_BYTES];
            let length = rustix::fs::lgetxattr(at, name, &mut value)?;
            found.insert(name.to_owned(), hex::encode(&value[..length]));
        }
    }
    Ok(found)
}
