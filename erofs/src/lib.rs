//! The EROFS writer: a layer's tar stream becomes one file that the guest mounts.
//!
//! Nothing is ever unpacked onto the host: file contents stream straight into blocks of the image, names and inodes stay
//! in memory (bounded, see the limits) and are appended as metadata. Own code, since the crate erofs-rs only reads and
//! Debian 12's mkfs.erofs 1.5 takes no tar.
//!
//! ```text
//! tar (headers, PAX, GNU) ──entry──► tree (names, whiteouts, links) ──finish──► image (layout, inodes, directories)
//!           └──content──► data (blocks, holes, tails) ─────────────────────────────┘
//! ```
//!
//! The file, in blocks of 4 KiB: 0 superblock | contents as they came | inodes with their xattrs, tails and chunk maps |
//! directory blocks. The superblock is written last, so an unfinished file can't be mounted.
//!
//! What overlayfs needs of a layer is made here: `.wh.x` becomes a character device 0:0, `.wh..wh..opq` the xattr
//! `trusted.overlay.opaque=y` of its directory; `trusted.overlay.*` from the archive is dropped, as it would let a layer
//! redirect names to other layers' files.
//!
//! A layer is converted without knowing those below. Where it leaves a parent directory out, the directory gets mode
//! 0755 and owner 0:0 and hides what the lower layer says about it; builders that write proper layers don't do that.

mod data;
mod error;
mod format;
mod image;
mod tar;
#[cfg(test)]
mod tests;
mod tree;

use std::fs::File;
use std::io::Read;
use std::path::Path;

pub use error::{ErofsError, ErofsResult};

use data::DataWriter;
use tar::{Entry, EntryKind, TarReader};
use tree::{Kind, Name, Tree};

/// Files and directories of one layer. The largest published images have some hundred thousand.
const MAX_ENTRIES: usize = 1_000_000;
/// Names, link targets and xattrs of one layer together, in bytes: they are kept in memory.
const MAX_NAME_BYTES: usize = 128 << 20;
/// Longest path of an entry in bytes, Linux's PATH_MAX.
const MAX_PATH: usize = 4096;
/// Longest name in bytes, Linux's NAME_MAX.
const MAX_NAME: usize = 255;
/// Directories in directories, symbolic links followed.
const MAX_DEPTH: usize = 1024;
/// Longest target of a symbolic link in bytes: PATH_MAX without its NUL.
const MAX_TARGET: usize = 4095;
/// Extended attributes of one file in bytes, names included: Linux's own limit for one value.
const MAX_XATTR_BYTES: usize = 64 << 10;
/// Largest file in bytes, holes included.
const MAX_FILE: u64 = 1 << 40;

/// Bytes copied at a time.
const COPY: usize = 64 << 10;

/// Writes the tree of the tar stream `input` into `file`, which is empty and lies at `path`; `scratch` is a directory
/// for an unnamed temporary file, `what` the stream's name in errors. Stops behind the archive's end mark. Blocks.
///
/// On an error `file` holds garbage without a superblock.
///
/// # Errors
/// Entries that an image must not contain, a damaged stream, exceeded limits, and I/O errors.
pub fn write_image(
    input: &mut impl Read,
    file: &File,
    path: &Path,
    scratch: &Path,
    what: &str,
) -> ErofsResult<()> {
    let mut tar = TarReader::new(input, what);
    let mut tree = Tree::new();
    let mut data = DataWriter::new(file, path, scratch)?;
    let mut buffer = vec![0; COPY];
    while let Some(entry) = tar.next()? {
        add(&mut tree, &mut data, &mut tar, &entry, &mut buffer)?;
    }
    image::write(tree, data)
}

/// Puts one entry into the tree, its content into the file.
fn add(
    tree: &mut Tree,
    data: &mut DataWriter<'_>,
    tar: &mut TarReader<'_, impl Read>,
    entry: &Entry,
    buffer: &mut [u8],
) -> ErofsResult<()> {
    let refused = |reason: String| refuse(&entry.name, reason);
    let (parent, name) = match tree.locate(&entry.name).map_err(refused)? {
        Name::Root if entry.kind == EntryKind::Dir => return tree.set_root(entry).map_err(refused),
        Name::Root => return Err(refused("only a directory can be the root".into())),
        Name::Child(parent, name) => (parent, name),
    };
    if name.starts_with(b".wh.") {
        return tree.white_out(parent, &name).map_err(refused);
    }
    let kind = match entry.kind {
        EntryKind::HardLink => {
            return tree.link(parent, name, &entry.link).map_err(refused);
        }
        EntryKind::Dir => Kind::Dir(Box::default()),
        EntryKind::File => Kind::File(content(data, tar, entry, buffer)?),
        EntryKind::Symlink => {
            check_target(&entry.link).map_err(refused)?;
            let mut target = data.file(entry.link.len() as u64)?;
            target.write(&entry.link)?;
            Kind::Symlink(entry.link.clone().into(), target.finish()?)
        }
        EntryKind::Char => Kind::Char(device(entry).map_err(refused)?),
        EntryKind::Block => Kind::Block(device(entry).map_err(refused)?),
        EntryKind::Fifo => Kind::Fifo,
    };
    tree.insert(parent, name, entry, kind).map_err(refused)
}

/// Copies a regular file's content, holes of its sparse map left out.
fn content(
    data: &mut DataWriter<'_>,
    tar: &mut TarReader<'_, impl Read>,
    entry: &Entry,
    buffer: &mut [u8],
) -> ErofsResult<data::Data> {
    if entry.size > MAX_FILE {
        let what = format!("the size of layer entry {:?}", show(&entry.name));
        return Err(ErofsError::TooLarge {
            what,
            limit: MAX_FILE,
            unit: "bytes",
        });
    }
    let mut file = data.file(entry.size)?;
    let mut at = 0;
    for segment in &entry.segments {
        file.zeros(segment.offset - at)?;
        let mut left = segment.length;
        while left > 0 {
            let most = buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = tar.read(&entry.name, &mut buffer[..most])?;
            file.write(&buffer[..read])?;
            left -= read as u64;
        }
        at = segment.offset + segment.length;
    }
    file.zeros(entry.size - at)?;
    file.finish()
}

fn check_target(target: &[u8]) -> Result<(), String> {
    match target {
        [] => Err("the symbolic link has no target".into()),
        t if t.contains(&0) => Err("the symbolic link's target contains a NUL".into()),
        t if t.len() > MAX_TARGET => Err(format!(
            "the symbolic link's target has more than {MAX_TARGET} bytes"
        )),
        _ => Ok(()),
    }
}

/// Linux's new_encode_dev: 12 bits major, 20 bits minor.
fn device(entry: &Entry) -> Result<u32, String> {
    let (major, minor) = entry.device;
    if major > 0xfff || minor > 0xf_ffff {
        return Err(format!("the device number {major}:{minor} is out of range"));
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// An entry that can't be accepted.
fn refuse(name: &[u8], reason: String) -> ErofsError {
    ErofsError::Entry {
        entry: show(name),
        reason,
    }
}

/// A name for messages: whatever its bytes, readable and not too long.
fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(&name[..name.len().min(MAX_NAME)]).into_owned()
}
