//! On-disk format of EROFS: constants and records used by this writer.
//!
//! Only bytes; `image` decides their position. From the kernel's fs/erofs/erofs_fs.h and
//! Documentation/filesystems/erofs.rst: 4 KiB blocks, extended inodes, uncompressed, layouts flat, inline and
//! chunk-based, so that Linux 5.15 and later mount it.

/// Size of a block in bytes.
pub(super) const BLOCK_BYTES: usize = 4096;
const BLOCK_BITS: u8 = 12;
/// Offset of the superblock in block 0.
const SUPERBLOCK: usize = 1024;
/// Unit of inode numbers in bytes.
pub(super) const SLOT: u64 = 32;
/// Size of an extended inode in bytes.
pub(super) const INODE: usize = 64;
/// Size of a directory entry in bytes, without its name.
pub(super) const DIRENT: usize = 12;
/// Block number of a chunk without content.
pub(super) const HOLE: u32 = u32::MAX;

const MAGIC: u32 = 0xE0F5_E1E2;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED: u32 = 0x4;
/// Size of the header of an attribute area in bytes.
pub(super) const XATTR_HEADER: usize = 12;

/// Data layout of an inode.
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
    /// Returns the type with this number.
    pub(super) fn from_number(number: u8) -> Option<Self> {
        let all = [
            Self::Regular,
            Self::Dir,
            Self::Char,
            Self::Block,
            Self::Fifo,
            Self::Symlink,
        ];
        all.into_iter().find(|kind| *kind as u8 == number)
    }

    /// Type bits of `st_mode`.
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

/// Content of an inode record.
pub(super) struct InodeRecord {
    pub layout: Layout,
    /// Length of the attribute area behind the inode, see [`xattr_area`].
    pub xattr_area: usize,
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
    /// Encodes an extended inode.
    pub(super) fn encode(&self) -> [u8; INODE] {
        let mut out = [0; INODE];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(1 | (self.layout as u16) << 1).to_le_bytes());
        // The header of 12 bytes counts as one unit, and so does every 4 bytes after it.
        let units = if self.xattr_area == 0 {
            0
        } else {
            (self.xattr_area - XATTR_HEADER) / 4 + 1
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

/// Chunk format of an inode with chunks of `1 << bits` bytes and a map of 4-byte addresses.
pub(super) fn chunk_format(bits: u32) -> u32 {
    bits - u32::from(BLOCK_BITS)
}

/// Length of the attribute area for attributes whose encodings have `encoded` bytes; 0 without attributes.
pub(super) fn xattr_area(encoded: usize) -> usize {
    match encoded {
        0 => 0,
        _ => XATTR_HEADER + encoded,
    }
}

/// Length of an encoded attribute.
pub(super) fn xattr_length(name: &[u8], value: &[u8]) -> usize {
    (4 + name.len() + value.len()).next_multiple_of(4)
}

/// Appends an attribute that is not shared with other inodes. `prefix` is the number of its name's prefix.
pub(super) fn encode_xattr(out: &mut Vec<u8>, prefix: u8, name: &[u8], value: &[u8]) {
    let end = out.len() + xattr_length(name, value);
    out.extend([name.len() as u8, prefix]);
    out.extend((value.len() as u16).to_le_bytes());
    out.extend(name);
    out.extend(value);
    out.resize(end, 0);
}

/// Encodes a directory entry whose name is at `name_offset` of the block.
pub(super) fn encode_dirent(nid: u64, name_offset: usize, file_type: FileType) -> [u8; DIRENT] {
    let mut out = [0; DIRENT];
    out[..8].copy_from_slice(&nid.to_le_bytes());
    out[8..10].copy_from_slice(&(name_offset as u16).to_le_bytes());
    out[10] = file_type as u8;
    out
}

/// Content of the superblock.
pub(super) struct Superblock {
    pub root_nid: u16,
    pub inodes: u64,
    pub blocks: u32,
    pub meta_block: u32,
    pub chunked: bool,
}

impl Superblock {
    /// Encodes block 0.
    pub(super) fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut out = [0; BLOCK_BYTES];
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

/// Returns the CRC-32C as the kernel's `crc32c(~0, …)` does, without the final inversion.
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
    fn crc32c_of_check_string_matches_rfc_3720() {
        // RFC 3720's check value of "123456789", before its final inversion.
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn encode_xattr_appends_the_announced_length() {
        let one: (&[u8], &[u8]) = (b"overlay.opaque", b"y");
        let two: (&[u8], &[u8]) = (b"", b"");
        for set in [vec![], vec![one], vec![one, two], vec![two]] {
            let mut out = Vec::new();
            set.iter()
                .for_each(|(n, v)| encode_xattr(&mut out, 4, n, v));
            let announced: usize = set.iter().map(|(n, v)| xattr_length(n, v)).sum();
            assert_eq!(out.len(), announced);
        }
    }
}
