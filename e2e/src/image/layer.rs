//! [`LayerTar`]: a layer's tar stream, written entry by entry, and [`Layer`], its compressed blob.
//!
//! Also writes entries that real tools never produce: names with `..`, absolute names, links out of the tree.

use super::digest;
use crate::failure::Result;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use tar::{EntryType, Header};

/// Compression of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    /// Uncompressed.
    Plain,
    /// gzip, the usual form.
    Gzip,
    /// zstd, since OCI 1.1.
    Zstd,
}

/// A layer as stored in a registry.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// Compressed bytes.
    pub blob: Vec<u8>,
    /// Digest of [`Self::blob`].
    pub digest: String,
    /// Digest of the tar stream.
    pub diff_id: String,
    /// Compression of the blob.
    pub compression: Compression,
}

/// A tar stream under construction.
pub(crate) struct LayerTar {
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

    /// Adds a regular file.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<&mut Self> {
        self.owned_file(path, mode, (0, 0), content)
    }

    /// Adds a regular file with an owner.
    pub(crate) fn owned_file(
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

    /// Adds a directory.
    pub(crate) fn dir(&mut self, path: &str, mode: u32) -> Result<&mut Self> {
        self.owned_dir(path, mode, (0, 0))
    }

    /// Adds a directory with an owner.
    pub(crate) fn owned_dir(
        &mut self,
        path: &str,
        mode: u32,
        owner: (u64, u64),
    ) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Directory, mode, 0);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        self.tar.append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// Adds a symbolic link with any target.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Symlink, 0o777, 0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// Adds a hard link to a path of this layer.
    pub(crate) fn hard_link(&mut self, path: &str, target: &str) -> Result<&mut Self> {
        self.hard_link_of_mode(path, target, 0o644)
    }

    /// Adds a hard link with this mode in its header. Tools normally write the file's mode; containerd applies it to the
    /// file.
    pub(crate) fn hard_link_of_mode(
        &mut self,
        path: &str,
        target: &str,
        mode: u32,
    ) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Link, mode, 0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// Adds a character device.
    pub(crate) fn char_device(&mut self, path: &str, major: u32, minor: u32) -> Result<&mut Self> {
        let mut header = Self::header(EntryType::Char, 0o666, 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.tar.append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// Sets an extended attribute of the next entry.
    pub(crate) fn xattr(&mut self, name: &str, value: &[u8]) -> Result<&mut Self> {
        let key = format!("SCHILY.xattr.{name}");
        self.tar.append_pax_extensions([(key.as_str(), value)])?;
        Ok(self)
    }

    /// Adds a whiteout, which removes a path of the layers below.
    pub(crate) fn whiteout(&mut self, dir: &str, name: &str) -> Result<&mut Self> {
        self.file(&format!("{dir}/.wh.{name}"), 0o644, b"")
    }

    /// Adds an opaque marker, which removes the content of this directory in the layers below.
    pub(crate) fn opaque(&mut self, dir: &str) -> Result<&mut Self> {
        self.file(&format!("{dir}/.wh..wh..opq"), 0o644, b"")
    }

    /// Adds an entry whose name and link target are written verbatim. At most 100 bytes each.
    pub(crate) fn raw(
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

    /// Sets PAX records of the next entry.
    pub(crate) fn pax(&mut self, records: &[(String, Vec<u8>)]) -> Result {
        let records = records.iter().map(|(k, v)| (k.as_str(), v.as_slice()));
        Ok(self.tar.append_pax_extensions(records)?)
    }

    /// Adds an entry with a name of any bytes and length.
    pub(crate) fn bytes_file(
        &mut self,
        kind: EntryType,
        path: &[u8],
        mode: u32,
        content: &[u8],
    ) -> Result {
        let mut header = Self::header(kind, mode, content.len() as u64);
        Ok(self.tar.append_data(&mut header, path_of(path), content)?)
    }

    /// Adds a hard or symbolic link with names of any bytes and length.
    pub(crate) fn bytes_link(&mut self, kind: EntryType, path: &[u8], target: &[u8]) -> Result {
        let mut header = Self::header(kind, 0o644, 0);
        Ok(self
            .tar
            .append_link(&mut header, path_of(path), path_of(target))?)
    }

    /// Adds a device or FIFO with a name of any bytes and length.
    pub(crate) fn bytes_device(
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
    pub(crate) fn finish(self, compression: Compression) -> Result<Layer> {
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
