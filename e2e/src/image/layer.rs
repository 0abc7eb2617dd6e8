//! [`LayerTar`]: one layer's tar stream, entry by entry, and [`Layer`], the compressed blob of it.
//!
//! Writes what it is told, also what no honest tool writes: names with `..`, absolute names, links out of the tree.

use super::digest;
use crate::outcome::Result;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tar::{EntryType, Header};

/// How a layer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    Plain,
    /// The usual.
    Gzip,
    /// OCI 1.1.
    Zstd,
}

/// A layer as a registry has it.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Compressed bytes.
    pub blob: Vec<u8>,
    /// Digest of [`Self::blob`].
    pub digest: String,
    /// Digest of the tar stream.
    pub diff_id: String,
    /// How it is compressed.
    pub compression: Compression,
}

/// A tar stream under construction.
pub struct LayerTar {
    tar: tar::Builder<Vec<u8>>,
}

impl Default for LayerTar {
    fn default() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }
}

fn path_of(bytes: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

/// Modification time of every entry, seconds since the epoch: a layer is the same bytes every time it is built.
const MTIME: u64 = 1_700_000_000;

impl LayerTar {
    fn header(kind: EntryType, mode: u32, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(MTIME);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<&mut Self> {
        self.owned_file(path, mode, (0, 0), content)
    }

    /// A regular file of this user and group.
    pub fn owned_file(
        &mut self,
        path: &str,
        mode: u32,
        owner: (u64, u64),
        content: &[u8],
    ) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Regular, mode, content.len() as u64);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        self.tar.append_data(&mut header, path, content)?;
        Ok(self)
    }

    /// A directory.
    pub fn dir(&mut self, path: &str, mode: u32) -> Result<&mut Self> {
        self.owned_dir(path, mode, (0, 0))
    }

    /// A directory of this user and group.
    pub fn owned_dir(&mut self, path: &str, mode: u32, owner: (u64, u64)) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Directory, mode, 0);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        self.tar.append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// A symbolic link with any target.
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Symlink, 0o777, 0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// A hard link to a path of this layer.
    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        self.hard_link_of_mode(path, target, 0o644)
    }

    /// A hard link whose header says this mode: honest tools write the file's own, and containerd gives it to the file.
    pub fn hard_link_of_mode(&mut self, path: &str, target: &str, mode: u32) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Link, mode, 0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// A character device.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Char, 0o666, 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.tar.append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// Extended attributes of the entry that follows.
    pub fn xattr(&mut self, name: &str, value: &[u8]) -> Result<&mut Self> {
        let key = format!("SCHILY.xattr.{name}");
        self.tar.append_pax_extensions([(key.as_str(), value)])?;
        Ok(self)
    }

    /// "The layers below lose this path."
    pub fn whiteout(&mut self, dir: &str, name: &str) -> Result<&mut Self> {
        self.file(&format!("{dir}/.wh.{name}"), 0o644, b"")
    }

    /// "The layers below lose what is in this directory."
    pub fn opaque(&mut self, dir: &str) -> Result<&mut Self> {
        self.file(&format!("{dir}/.wh..wh..opq"), 0o644, b"")
    }

    /// An entry whose name and link target are written byte by byte, whatever they are. At most 100 bytes each.
    pub fn raw(
        &mut self,
        kind: EntryType,
        name: &str,
        target: &str,
        content: &[u8],
    ) -> Result<&mut Self> {
        let mut header = Self::header(kind, 0o644, content.len() as u64);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        self.tar.append(&header, content)?;
        Ok(self)
    }

    /// PAX records for the entry that follows.
    pub fn pax(&mut self, records: &[(String, Vec<u8>)]) -> Result {
        let records = records.iter().map(|(k, v)| (k.as_str(), v.as_slice()));
        Ok(self.tar.append_pax_extensions(records)?)
    }

    /// An entry with a name of any bytes and any length.
    pub fn bytes_file(
        &mut self,
        kind: EntryType,
        path: &[u8],
        mode: u32,
        content: &[u8],
    ) -> Result {
        let mut header = Self::header(kind, mode, content.len() as u64);
        Ok(self.tar.append_data(&mut header, path_of(path), content)?)
    }

    /// A hard or symbolic link with names of any bytes and any length.
    pub fn bytes_link(&mut self, kind: EntryType, path: &[u8], target: &[u8]) -> Result {
        let mut header = Self::header(kind, 0o644, 0);
        Ok(self
            .tar
            .append_link(&mut header, path_of(path), path_of(target))?)
    }

    /// A device or FIFO with a name of any bytes and any length.
    pub fn bytes_device(
        &mut self,
        kind: EntryType,
        path: &[u8],
        mode: u32,
        numbers: (u32, u32),
    ) -> Result {
        let mut header = Self::header(kind, mode, 0);
        header.set_device_major(numbers.0)?;
        header.set_device_minor(numbers.1)?;
        Ok(self
            .tar
            .append_data(&mut header, path_of(path), std::io::empty())?)
    }

    /// Ends the tar stream and compresses it.
    pub fn finish(self, compression: Compression) -> Result<Layer> {
        let tar = self.tar.into_inner()?;
        let diff_id = digest(&tar);
        let blob = match compression {
            Compression::Plain => tar,
            Compression::Gzip => {
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(&tar)?;
                encoder.finish()?
            }
            Compression::Zstd => zstd::encode_all(tar.as_slice(), 1)?,
        };
        Ok(Layer {
            digest: digest(&blob),
            diff_id,
            blob,
            compression,
        })
    }
}
