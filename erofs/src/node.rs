//! [`Node`]: everything about an inode but its directory entries, as a record of fixed size in a [`Store`].

use std::io;

use super::data::{Blob, Data};
use super::format::FileType;
use super::store::Store;

/// Index of a node.
pub(crate) type NodeId = u32;

/// Bytes of a record.
const RECORD_BYTES: usize = 64;

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub file_type: FileType,
    /// Permissions, setuid, setgid and sticky bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and additional nanoseconds.
    pub mtime: (i64, u32),
    /// Content of a regular file or symbolic link.
    pub data: Data,
    /// Number of a device.
    pub device: u32,
    /// Encoded attributes, in the tree's bytes.
    pub xattrs: Blob,
    /// Target of a symbolic link, in the tree's bytes.
    pub target: Blob,
}

impl Node {
    /// A node of this type without attributes and content.
    pub(crate) fn new(file_type: FileType, mode: u16) -> Self {
        Self {
            file_type,
            mode,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            data: Data::EMPTY,
            device: 0,
            xattrs: Blob::default(),
            target: Blob::default(),
        }
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut out = [0; RECORD_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        let (layout, bits, size, block, blob) = match self.data {
            Data::Flat { size, block, tail } => (0, 0, size, block, tail),
            Data::Chunked { size, bits, map } => (1, bits, size, 0, map),
        };
        put(0, &self.mode.to_le_bytes());
        put(2, &[self.file_type as u8 | layout << 4, bits as u8]);
        put(4, &self.uid.to_le_bytes());
        put(8, &self.gid.to_le_bytes());
        put(12, &self.mtime.1.to_le_bytes());
        put(16, &self.mtime.0.to_le_bytes());
        put(24, &size.to_le_bytes());
        put(32, &(block | self.device).to_le_bytes());
        put(36, &blob.length.to_le_bytes());
        put(40, &blob.offset.to_le_bytes());
        // The tree's bytes are limited to MAX_ALL_NAMES_BYTES.
        put(48, &(self.xattrs.offset as u32).to_le_bytes());
        put(52, &self.xattrs.length.to_le_bytes());
        put(56, &(self.target.offset as u32).to_le_bytes());
        put(60, &(self.target.length as u16).to_le_bytes());
        out
    }

    fn decode(record: &[u8; RECORD_BYTES]) -> io::Result<Self> {
        let u16_at = |at| u16::from_le_bytes([record[at], record[at + 1]]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let file_type = FileType::from_number(record[2] & 0xf).ok_or(io::ErrorKind::InvalidData)?;
        let is_device = matches!(file_type, FileType::Char | FileType::Block);
        let (size, block) = (u64_at(24), u32_at(32));
        let blob = Blob {
            offset: u64_at(40),
            length: u32_at(36),
        };
        Ok(Self {
            file_type,
            mode: u16_at(0),
            uid: u32_at(4),
            gid: u32_at(8),
            mtime: (u64_at(16).cast_signed(), u32_at(12)),
            data: match record[2] >> 4 {
                0 => Data::Flat {
                    size,
                    block: if is_device { 0 } else { block },
                    tail: blob,
                },
                _ => Data::Chunked {
                    size,
                    bits: u32::from(record[3]),
                    map: blob,
                },
            },
            device: if is_device { block } else { 0 },
            xattrs: Blob {
                offset: u32_at(48).into(),
                length: u32_at(52),
            },
            target: Blob {
                offset: u32_at(56).into(),
                length: u16_at(60).into(),
            },
        })
    }
}

/// Nodes by index.
pub(crate) struct Nodes {
    records: Store,
    /// File type of each node, for lookups without reading its record.
    file_types: Vec<FileType>,
}

impl Nodes {
    pub(crate) fn new(records: Store) -> Self {
        Self {
            records,
            file_types: Vec::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.file_types.len()
    }

    pub(crate) fn file_type(&self, id: NodeId) -> FileType {
        self.file_types[id as usize]
    }

    pub(crate) fn get(&self, id: NodeId) -> io::Result<Node> {
        let mut record = [0; RECORD_BYTES];
        self.records
            .read_at(u64::from(id) * RECORD_BYTES as u64, &mut record)?;
        Node::decode(&record)
    }

    pub(crate) fn push(&mut self, node: &Node) -> io::Result<NodeId> {
        self.records.append(&node.encode())?;
        self.file_types.push(node.file_type);
        Ok((self.file_types.len() - 1) as NodeId)
    }

    /// Replaces a node by one of the same type.
    pub(crate) fn set(&mut self, id: NodeId, node: &Node) -> io::Result<()> {
        self.records
            .write_at(u64::from(id) * RECORD_BYTES as u64, &node.encode())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_return_pushed_values() {
        let directory = tempfile::tempdir().unwrap();
        let mut nodes = Nodes::new(Store::new(directory.path()));
        let mut link = Node::new(FileType::Symlink, 0o777);
        (link.uid, link.gid, link.mtime) = (u32::MAX, 7, (-5, 999_999_999));
        link.data = Data::Flat {
            size: 4095,
            block: 0x1234_5678,
            tail: Blob {
                offset: 1 << 40,
                length: 2048,
            },
        };
        link.xattrs = Blob {
            offset: 0x0fff_ffff,
            length: 70_000,
        };
        link.target = Blob {
            offset: 9,
            length: 4095,
        };
        let mut sparse = Node::new(FileType::Regular, 0o4755);
        sparse.data = Data::Chunked {
            size: 1 << 40,
            bits: 24,
            map: Blob {
                offset: 3,
                length: 262_144,
            },
        };
        let mut device = Node::new(FileType::Block, 0o600);
        device.device = 0x0fff_ffff;
        for (id, node) in [&link, &sparse, &device].into_iter().enumerate() {
            assert_eq!(nodes.push(node).unwrap() as usize, id);
        }
        sparse.uid = 3;
        nodes.set(1, &sparse).unwrap();
        for (id, node) in [&link, &sparse, &device].into_iter().enumerate() {
            assert_eq!(&nodes.get(id as NodeId).unwrap(), node);
            assert_eq!(nodes.file_type(id as NodeId), node.file_type);
        }
    }
}
