//! Converts the tar stream of an image layer to an EROFS image that the guest mounts.
//!
//! Nothing is unpacked onto the host: file contents are streamed into blocks of the image, names and inodes are gathered and
//! appended as metadata. The memory of a conversion is below 64 MiB for every layer; the excess is in unnamed temporary
//! files. This is code of this project because the crate erofs-rs only reads, and mkfs.erofs 1.5 of Debian 12 cannot read tar.
//!
//! ```text
//! tar (headers, PAX, GNU) ──entry──► tree (names, whiteouts, links) ──finish──► image (layout, inodes, directories)
//!           └──content──► data (blocks, holes, tails) ─────────────────────────────┘
//! ```
//!
//! The image, in blocks of 4 KiB: superblock | contents in their order of arrival | inodes with their attributes, tails and
//! chunk maps | directory blocks. The superblock is written last, so an unfinished image cannot be mounted.
//!
//! Layers get the form that overlayfs needs: `.wh.x` becomes a character device 0:0, `.wh..wh..opq` the attribute
//! `trusted.overlay.opaque=y` of its directory. Attributes `trusted.overlay.*` of the archive are dropped, because they would
//! let a layer redirect names to files of other layers.
//!
//! A layer is converted without knowledge of the layers below. If it omits a parent directory, the directory gets mode 0755
//! and owner 0:0, which hides the metadata in the lower layer. Well-behaved builders include parent directories.

mod data;
mod error;
mod format;
mod image;
mod node;
mod store;
mod tar;
#[cfg(test)]
mod tests;
mod tree;

use std::fs::File;
use std::io::Read;
use std::path::Path;

pub use error::{ErofsError, ErofsResult};

use data::{Data, DataWriter};
use format::FileType;
use node::Node;
use tar::{Entry, EntryKind, TarReader};
use tree::{Name, Tree, TreeError};

/// Maximum number of files and directories of a layer. The largest published images have some hundred thousand.
const MAX_ENTRIES: usize = 1_000_000;
/// Maximum length of names, link targets and attributes of a layer together, in bytes.
const MAX_ALL_NAMES_BYTES: usize = 128 << 20;
/// Maximum number of path components resolved for a layer, links followed. Every entry may be 32 directories deep.
const MAX_STEPS: u64 = match cfg!(test) {
    true => 1_000_000,
    false => 32 * MAX_ENTRIES as u64,
};
/// Maximum length of an entry's path in bytes: Linux's PATH_MAX.
const MAX_PATH_BYTES: usize = 4096;
/// Maximum length of a name in bytes: Linux's NAME_MAX.
const MAX_NAME_BYTES: usize = 255;
/// Maximum depth of directories, symbolic links followed.
const MAX_DEPTH: usize = 1024;
/// Maximum length of a symbolic link's target in bytes: PATH_MAX without its NUL.
const MAX_TARGET_BYTES: usize = 4095;
/// Maximum length of a file's extended attributes in bytes, including names: Linux's limit for one value.
const MAX_XATTR_BYTES: usize = 64 << 10;
/// Maximum size of a file in bytes, including holes.
const MAX_FILE_BYTES: u64 = 1 << 40;

/// Bytes copied at a time.
const COPY_BYTES: usize = 64 << 10;

/// A conversion's output and environment.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// The empty file that becomes the image.
    pub file: &'a File,
    /// Path of `file`, for errors.
    pub path: &'a Path,
    /// Directory for unnamed temporary files.
    pub scratch: &'a Path,
    /// Polled several times a second: whether the result is no longer needed.
    pub cancelled: &'a dyn Fn() -> bool,
}

/// Converts the tar stream `input` to an EROFS image. `name` is the name of the stream in errors. Stops after the archive's
/// end mark. Blocks.
///
/// After an error the file has no superblock and cannot be mounted.
///
/// # Errors
/// Entries that an image must not contain, a damaged stream, exceeded limits, cancellation, and I/O errors.
pub fn write_image(input: &mut impl Read, name: &str, target: Target<'_>) -> ErofsResult<()> {
    let mut conversion = Conversion {
        tar: TarReader::new(input, name),
        tree: Tree::new(target.scratch)
            .map_err(|e| ErofsError::io("create the temporary files of", target.path, e))?,
        data: DataWriter::new(target.file, target.path, target.scratch)?,
        buffer: vec![0; COPY_BYTES],
        target,
    };
    while let Some(entry) = conversion.tar.next()? {
        check((target.cancelled)())?;
        conversion.add(&entry)?;
    }
    let Conversion { tree, data, .. } = conversion;
    image::write(tree, data, target.path, target.cancelled)
}

/// Fails if the conversion is cancelled.
fn check(cancelled: bool) -> ErofsResult<()> {
    match cancelled {
        true => Err(ErofsError::Cancelled),
        false => Ok(()),
    }
}

struct Conversion<'a, R> {
    tar: TarReader<'a, R>,
    tree: Tree,
    data: DataWriter<'a>,
    buffer: Vec<u8>,
    target: Target<'a>,
}

impl<R: Read> Conversion<'_, R> {
    /// Adds an entry to the tree, and its content to the image.
    fn add(&mut self, entry: &Entry) -> ErofsResult<()> {
        let path = self.target.path;
        let failed = |error| match error {
            TreeError::Invalid(reason) => reject(&entry.name, reason),
            TreeError::Io(error) => ErofsError::io("access the temporary files of", path, error),
        };
        let rejected = |reason| reject(&entry.name, reason);
        let (parent, name) = match self.tree.locate(&entry.name).map_err(failed)? {
            Name::Root if entry.kind == EntryKind::Dir => {
                return self.tree.set_root(entry).map_err(failed);
            }
            Name::Root => return Err(rejected("only a directory can be the root".into())),
            Name::Child(parent, name) => (parent, name),
        };
        if name.starts_with(b".wh.") {
            return self.tree.white_out(parent, &name).map_err(failed);
        }
        let file_type = match entry.kind {
            EntryKind::HardLink => {
                let linked = self.tree.link(parent, &name, &entry.link);
                return linked.map_err(failed);
            }
            EntryKind::Dir => FileType::Dir,
            EntryKind::File => FileType::Regular,
            EntryKind::Symlink => FileType::Symlink,
            EntryKind::Char => FileType::Char,
            EntryKind::Block => FileType::Block,
            EntryKind::Fifo => FileType::Fifo,
        };
        let mut node = Node::new(file_type, 0);
        match entry.kind {
            EntryKind::File => node.data = self.content(entry)?,
            EntryKind::Symlink => {
                check_target(&entry.link).map_err(rejected)?;
                let mut target = self.data.file(entry.link.len() as u64)?;
                target.write(&entry.link)?;
                node.data = target.finish()?;
            }
            EntryKind::Char | EntryKind::Block => node.device = device(entry).map_err(rejected)?,
            _ => {}
        }
        let inserted = self.tree.insert(parent, &name, entry, node);
        inserted.map_err(failed)
    }

    /// Copies the content of a regular file without the holes of its sparse map.
    fn content(&mut self, entry: &Entry) -> ErofsResult<Data> {
        if entry.size > MAX_FILE_BYTES {
            return Err(ErofsError::TooLarge {
                subject: format!("the size of layer entry {:?}", show(&entry.name)),
                limit: MAX_FILE_BYTES,
                unit: "bytes",
            });
        }
        let mut file = self.data.file(entry.size)?;
        let mut at = 0;
        for segment in &entry.segments {
            file.zeros(segment.offset - at)?;
            let mut left = segment.length;
            while left > 0 {
                check((self.target.cancelled)())?;
                let most = self
                    .buffer
                    .len()
                    .min(usize::try_from(left).unwrap_or(usize::MAX));
                let read = self.tar.read(&entry.name, &mut self.buffer[..most])?;
                file.write(&self.buffer[..read])?;
                left -= read as u64;
            }
            at = segment.offset + segment.length;
        }
        file.zeros(entry.size - at)?;
        file.finish()
    }
}

fn check_target(target: &[u8]) -> Result<(), String> {
    match target {
        [] => Err("the symbolic link has no target".into()),
        t if t.contains(&0) => Err("the symbolic link's target contains a NUL".into()),
        t if t.len() > MAX_TARGET_BYTES => Err(format!(
            "the symbolic link's target has more than {MAX_TARGET_BYTES} bytes"
        )),
        _ => Ok(()),
    }
}

/// Encodes a device number as Linux's new_encode_dev: 12 bits major, 20 bits minor.
fn device(entry: &Entry) -> Result<u32, String> {
    let (major, minor) = entry.device;
    if major > 0xfff || minor > 0xf_ffff {
        return Err(format!("the device number {major}:{minor} is out of range"));
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// Error for an entry that is not acceptable.
fn reject(name: &[u8], reason: String) -> ErofsError {
    ErofsError::Entry {
        entry: show(name),
        reason,
    }
}

/// Formats a name for messages, printable and cut to a bounded length.
fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(&name[..name.len().min(MAX_NAME_BYTES)]).into_owned()
}
