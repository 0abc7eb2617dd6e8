//! EROFS on disk: the constants and records this writer uses.
//!
//! Only bytes; what goes where is decided in `image`. From the kernel's fs/erofs/erofs_fs.h and
//! Documentation/filesystems/erofs.rst: 4 KiB blocks, extended inodes, uncompressed, layouts flat, inline and
//! chunk-based, so that Linux 5.15 and later mount it.

/// Bytes of a block.
pub(super) const BLOCK: usize = 4096;
const BLOCK_BITS: u8 = 12;
/// Where the superblock starts in block 0.
const SUPERBLOCK: usize = 1024;
/// Unit of an inode's number, in bytes.
pub(super) const SLOT: u64 = 32;
/// Bytes of an extended inode.
pub(super) const INODE: usize = 64;
/// Bytes of a directory entry without its name.
pub(super) const DIRENT: usize = 12;
/// A chunk without content.
pub(super) const HOLE: u32 = u32::MAX;

const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED: u32 = 0x4;

/// How an inode's content is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Plain = 0,
    Inline = 2,
    Chunked = 4,
}

/// File types of directory entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileType {
    Regular = 1,
    Dir = 2,
    Char = 3,
    Block = 4,
    Fifo = 5,
    Symlink = 7,
}

impl FileType {
    /// The type bits of `st_mode`.
    pub(super) fn mode(self) -> u16 {
        match self {
            Self::Regular => 0o100_000,
            Self::Dir => 0o040_000,
            Self::Char => 0o020_000,
            Self::Block => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Symlink => 0o120_000,
        }
    }
}

/// What an inode record says.
pub(super) struct InodeRecord {
    pub layout: Layout,
    /// Bytes of the attributes behind the inode, as [`xattr_area`] made them.
    pub xattr_bytes: usize,
    pub mode: u16,
    pub size: u64,
    /// First block, device number, or chunk format.
    pub union: u32,
    pub number: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub links: u32,
}

impl InodeRecord {
    /// The extended form.
    pub(super) fn encode(&self) -> [u8; INODE] {
        let mut out = [0; INODE];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(1 | (self.layout as u16) << 1).to_le_bytes());
        // The area has a header of 12 bytes, which counts as one unit, as does each 4 bytes behind it.
        let units = if self.xattr_bytes == 0 {
            0
        } else {
            (self.xattr_bytes - 12) / 4 + 1
        };
        put(2, &(units as u16).to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.union.to_le_bytes());
        put(20, &self.number.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.0.to_le_bytes());
        put(40, &self.mtime.1.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        out
    }
}

/// The chunk format of an inode whose chunks have `bits` and a map of 4-byte addresses.
pub(super) fn chunk_format(bits: u32) -> u32 {
    bits - u32::from(BLOCK_BITS)
}

/// Bytes that attributes take behind an inode.
pub(super) fn xattr_bytes<'a>(xattrs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> usize {
    let sum: usize = xattrs
        .into_iter()
        .map(|(name, value)| (4 + name.len() + value.len()).next_multiple_of(4))
        .sum();
    if sum == 0 { 0 } else { 12 + sum }
}

/// Appends the attributes (prefix number, name, value), none of them shared.
pub(super) fn encode_xattrs<'a>(
    out: &mut Vec<u8>,
    xattrs: impl IntoIterator<Item = (u8, &'a [u8], &'a [u8])>,
) {
    let mut xattrs = xattrs.into_iter().peekable();
    if xattrs.peek().is_none() {
        return;
    }
    out.extend([0; 12]);
    for (prefix, name, value) in xattrs {
        let start = out.len();
        out.extend([name.len() as u8, prefix]);
        out.extend((value.len() as u16).to_le_bytes());
        out.extend(name);
        out.extend(value);
        let padded = (out.len() - start).next_multiple_of(4);
        out.resize(start + padded, 0);
    }
}

/// One directory entry; its name stands at `name_offset` of the block.
pub(super) fn encode_dirent(nid: u64, name_offset: usize, file_type: FileType) -> [u8; DIRENT] {
    let mut out = [0; DIRENT];
    out[..8].copy_from_slice(&nid.to_le_bytes());
    out[8..10].copy_from_slice(&(name_offset as u16).to_le_bytes());
    out[10] = file_type as u8;
    out
}

/// What the superblock says.
pub(super) struct Superblock {
    pub root_nid: u16,
    pub inodes: u64,
    pub blocks: u32,
    pub meta_block: u32,
    pub chunked: bool,
}

impl Superblock {
    /// Block 0.
    pub(super) fn encode(&self) -> [u8; BLOCK] {
        let mut out = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| {
            out[SUPERBLOCK + at..SUPERBLOCK + at + bytes.len()].copy_from_slice(bytes)
        };
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        put(
            80,
            &(if self.chunked { INCOMPAT_CHUNKED } else { 0 }).to_le_bytes(),
        );
        let sum = crc32c(&out[SUPERBLOCK..]);
        out[SUPERBLOCK + 4..SUPERBLOCK + 8].copy_from_slice(&sum.to_le_bytes());
        out
    }
}

/// CRC-32C as the kernel's `crc32c(~0, …)`: not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82F6_3B78
            } else {
                crc >> 1
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_of_the_standard_check_string() {
        // RFC 3720's check value of "123456789", before its final inversion.
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn xattr_area_and_its_size_agree() {
        let one: (&[u8], &[u8]) = (b"overlay.opaque", b"y");
        let two: (&[u8], &[u8]) = (b"", b"");
        for set in [vec![], vec![one], vec![one, two], vec![two]] {
            let mut out = Vec::new();
            encode_xattrs(&mut out, set.iter().map(|(n, v)| (4, *n, *v)));
            assert_eq!(out.len(), xattr_bytes(set));
        }
    }
}
