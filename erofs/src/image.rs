//! Finishes an image: positions the inodes, then writes them, the directories and the superblock.
//!
//! Contents are already in their blocks, see `data`. There are two passes over the nodes, in the order of their indexes. The
//! first determines the position of each inode, because directories refer to them; the second writes.
//!
//! An inode begins at a slot of 32 bytes and never crosses the end of a block. Its attributes follow, then either its map
//! of chunks or its tail, which must not cross the end of a block either.

use std::path::Path;

use super::data::{Data, DataWriter, MAX_TAIL_BYTES};
use super::format::{
    self, BLOCK_BYTES, DIRENT, FileType, HOLE, INODE, InodeRecord, Layout, SLOT, Superblock,
    XATTR_HEADER,
};
use super::node::{Node, NodeId};
use super::tree::{Edge, ROOT, Tree, TreeError};
use super::{ErofsError, ErofsResult, check};

/// Position of the root's inode in the metadata. It is not 0: some programs treat inode number 0 as a deleted file.
const ROOT_POSITION: u64 = 2 * SLOT;
/// Bytes of metadata gathered before they are written; a multiple of the block size.
const FLUSH_BYTES: usize = 1 << 20;
/// Inodes between two checks for cancellation.
const CHECK_INTERVAL_INODES: usize = 4096;

/// Result of the first pass.
struct Plan {
    /// Number of links of each node; 0 for a node that is not in the image.
    links: Vec<u32>,
    /// Parent directory of each directory.
    parents: Vec<NodeId>,
    /// Inode number of each node.
    numbers: Vec<u32>,
    /// Number of inodes.
    count: u64,
    /// True if a file has chunks.
    chunked: bool,
    /// Length of the metadata in bytes.
    length: u64,
}

impl Plan {
    /// Nodes in the image, in ascending order.
    fn nodes(&self) -> impl Iterator<Item = NodeId> {
        (0..self.links.len() as NodeId).filter(|&id| self.links[id as usize] > 0)
    }
}

/// Length of a directory, and of the part next to its inode.
struct DirLength {
    length: u64,
    inline: usize,
}

impl DirLength {
    fn blocks(&self) -> u32 {
        (self.length - self.inline as u64).div_ceil(BLOCK_BYTES as u64) as u32
    }
}

/// Writes the nodes of `tree` after the contents in `data`. The file is complete then, but not synced.
pub(crate) fn write(
    mut tree: Tree,
    mut data: DataWriter<'_>,
    path: &Path,
    cancelled: &dyn Fn() -> bool,
) -> ErofsResult<()> {
    tree.finish().map_err(|error| match error {
        TreeError::Invalid(reason) => ErofsError::Invalid {
            subject: "layer".into(),
            reason,
        },
        TreeError::Io(error) => scratch_error(path)(error),
    })?;
    let plan = place(&tree, path, cancelled)?;
    let meta_block = data.next_block();
    let too_large = || ErofsError::TooLarge {
        subject: "the metadata of a layer".into(),
        limit: u64::from(HOLE),
        unit: "blocks",
    };
    let dirs_block = u32::try_from(plan.length.div_ceil(BLOCK_BYTES as u64))
        .ok()
        .and_then(|blocks| meta_block.checked_add(blocks))
        .ok_or_else(too_large)?;
    write_inodes(&tree, &plan, &mut data, dirs_block, path, cancelled)?;
    let mut cursor = 0;
    for (index, id) in plan.nodes().enumerate() {
        check(index % CHECK_INTERVAL_INODES == 0 && cancelled())?;
        if tree.file_type(id) == FileType::Dir {
            let edges = tree.edges_of(id, &mut cursor);
            let length = dir_length(edges);
            let names = dir_names(edges, id, plan.parents[id as usize]);
            for block in dir_blocks(names).take(length.blocks() as usize) {
                let block = encode_dir_block(&tree, &block, &plan.numbers);
                data.append(&block.map_err(scratch_error(path))?)?;
            }
        }
    }
    let superblock = Superblock {
        root_nid: (ROOT_POSITION / SLOT) as u16,
        inodes: plan.count,
        blocks: data.next_block(),
        meta_block,
        chunked: plan.chunked,
    };
    data.finish(&superblock.encode())
}

fn scratch_error(path: &Path) -> impl Fn(std::io::Error) -> ErofsError {
    |error| ErofsError::io("access the temporary files of", path, error)
}

/// Counts links, and determines the position of every inode that is still in the tree.
fn place(tree: &Tree, path: &Path, cancelled: &dyn Fn() -> bool) -> ErofsResult<Plan> {
    let mut plan = Plan {
        links: vec![0; tree.len()],
        parents: vec![ROOT; tree.len()],
        numbers: vec![0; tree.len()],
        count: 0,
        chunked: false,
        length: ROOT_POSITION,
    };
    plan.links[ROOT as usize] = 2;
    let mut cursor = 0;
    // A directory is created after its parent and has one name, so its links are known when it is reached.
    for id in 0..tree.len() as NodeId {
        if tree.file_type(id) != FileType::Dir || plan.links[id as usize] == 0 {
            continue;
        }
        for edge in tree.edges_of(id, &mut cursor) {
            let child = edge.child as usize;
            if tree.file_type(edge.child) == FileType::Dir {
                plan.links[child] = 2;
                plan.links[id as usize] += 1;
                plan.parents[child] = id;
            } else {
                plan.links[child] += 1;
            }
        }
    }
    let mut cursor = 0;
    for id in 0..tree.len() as NodeId {
        if plan.links[id as usize] == 0 {
            continue;
        }
        check(plan.count.is_multiple_of(CHECK_INTERVAL_INODES as u64) && cancelled())?;
        let node = tree.node(id).map_err(scratch_error(path))?;
        let head = (INODE + format::xattr_area(tree.xattrs_length(id, &node))) as u64;
        let (tail, map) = match (node.file_type, node.data) {
            (FileType::Dir, _) => (dir_length(tree.edges_of(id, &mut cursor)).inline as u64, 0),
            (_, Data::Flat { tail, .. }) => (tail.length.into(), 0),
            (_, Data::Chunked { map, .. }) => (0, map.length.into()),
        };
        plan.chunked |= matches!(node.data, Data::Chunked { .. });
        let position = fit(plan.length, head, tail);
        plan.length = position + head + tail + map;
        // The limits of a layer keep its metadata below 2^32 slots.
        plan.numbers[id as usize] = (position / SLOT) as u32;
        plan.count += 1;
    }
    // fsck.erofs 1.5 reads an attribute header after every inode, even if there is none: the file must not end there.
    plan.length += SLOT;
    Ok(plan)
}

/// Returns the first slot from `from` on for which neither the inode nor its tail crosses the end of a block.
fn fit(from: u64, head: u64, tail: u64) -> u64 {
    let block = BLOCK_BYTES as u64;
    let mut position = from.next_multiple_of(SLOT);
    // Terminates: tails have at most half a block, so one of the 128 slots of a block always fits.
    while position % block + INODE as u64 > block
        || (tail > 0 && (position + head) % block + tail > block)
    {
        position += SLOT;
    }
    position
}

fn write_inodes(
    tree: &Tree,
    plan: &Plan,
    data: &mut DataWriter<'_>,
    dirs_block: u32,
    path: &Path,
    cancelled: &dyn Fn() -> bool,
) -> ErofsResult<()> {
    let mut out: Vec<u8> = Vec::with_capacity(FLUSH_BYTES + BLOCK_BYTES);
    // Bytes of the metadata that are already written.
    let mut written = 0;
    let (mut cursor, mut dir_block) = (0, dirs_block);
    for (index, id) in plan.nodes().enumerate() {
        check(index % CHECK_INTERVAL_INODES == 0 && cancelled())?;
        let position = u64::from(plan.numbers[id as usize]) * SLOT;
        out.resize((position - written) as usize, 0);
        let node = tree.node(id).map_err(scratch_error(path))?;
        let xattrs = tree.xattrs(id, &node).map_err(scratch_error(path))?;
        let mut record = record(&node, index as u32 + 1, plan.links[id as usize]);
        record.xattr_area = format::xattr_area(xattrs.len());
        let edges = match node.file_type {
            FileType::Dir => tree.edges_of(id, &mut cursor),
            _ => &[],
        };
        let mut inline = Vec::new();
        if node.file_type == FileType::Dir {
            let length = dir_length(edges);
            (record.size, record.union) = (length.length, dir_block);
            dir_block += length.blocks();
            if length.inline > 0 {
                record.layout = Layout::Inline;
                let names = dir_names(edges, id, plan.parents[id as usize]);
                let last = dir_blocks(names).last().unwrap_or_default();
                inline =
                    encode_dir_block(tree, &last, &plan.numbers).map_err(scratch_error(path))?;
            }
        }
        out.extend(record.encode());
        if !xattrs.is_empty() {
            out.extend([0; XATTR_HEADER]);
            out.extend(xattrs);
        }
        out.extend(inline);
        match node.data {
            Data::Flat { tail, .. } => data.read(tail, &mut out)?,
            Data::Chunked { map, .. } => data.read(map, &mut out)?,
        }
        if out.len() >= FLUSH_BYTES {
            let whole = out.len() - out.len() % BLOCK_BYTES;
            data.append(&out[..whole])?;
            out.drain(..whole);
            written += whole as u64;
        }
    }
    out.resize((plan.length - written) as usize, 0);
    data.append(&out).map(drop)
}

/// The record of a node; attributes and a directory's content are the caller's.
fn record(node: &Node, number: u32, links: u32) -> InodeRecord {
    let (layout, union) = match node.data {
        Data::Chunked { bits, .. } => (Layout::Chunked, format::chunk_format(bits)),
        Data::Flat { block, tail, .. } => {
            let layout = match tail.length {
                0 => Layout::Plain,
                _ => Layout::Inline,
            };
            (layout, block | node.device)
        }
    };
    InodeRecord {
        layout,
        xattr_area: 0,
        mode: node.file_type.mode() | node.mode,
        size: node.data.size(),
        union,
        number,
        uid: node.uid,
        gid: node.gid,
        mtime: node.mtime,
        links,
    }
}

/// A name of a directory: that of an edge, or one or two dots.
#[derive(Clone, Copy)]
enum DirName<'a> {
    Edge(&'a Edge),
    Dots(usize, NodeId),
}

impl DirName<'_> {
    fn length(&self) -> usize {
        match self {
            Self::Edge(edge) => edge.name_length(),
            Self::Dots(count, _) => *count,
        }
    }
}

/// Names of a directory in their order on disk, including `.` and `..`.
fn dir_names(edges: &[Edge], id: NodeId, parent: NodeId) -> impl Iterator<Item = DirName<'_>> {
    let dot = edges.partition_point(|edge| edge.is_before_dots(1));
    let dots = edges.partition_point(|edge| edge.is_before_dots(2));
    let before = edges[..dot].iter().map(DirName::Edge);
    let between = edges[dot..dots].iter().map(DirName::Edge);
    let after = edges[dots..].iter().map(DirName::Edge);
    before
        .chain([DirName::Dots(1, id)])
        .chain(between)
        .chain([DirName::Dots(2, parent)])
        .chain(after)
}

/// Splits names into blocks: as many as fit with their entries.
fn dir_blocks<'a>(
    names: impl Iterator<Item = DirName<'a>>,
) -> impl Iterator<Item = Vec<DirName<'a>>> {
    let mut names = names.peekable();
    std::iter::from_fn(move || {
        let (mut block, mut used) = (Vec::new(), 0);
        while let Some(name) = names.next_if(|name| used + DIRENT + name.length() <= BLOCK_BYTES) {
            used += DIRENT + name.length();
            block.push(name);
        }
        (!block.is_empty()).then_some(block)
    })
}

fn dir_length(edges: &[Edge]) -> DirLength {
    let (mut blocks, mut last) = (0, 0);
    for block in dir_blocks(dir_names(edges, ROOT, ROOT)) {
        blocks += 1;
        last = block.iter().map(|name| DIRENT + name.length()).sum();
    }
    DirLength {
        length: ((blocks - 1) * BLOCK_BYTES + last) as u64,
        inline: if last <= MAX_TAIL_BYTES { last } else { 0 },
    }
}

fn encode_dir_block(
    tree: &Tree,
    names: &[DirName<'_>],
    numbers: &[u32],
) -> std::io::Result<Vec<u8>> {
    let (mut entries, mut text) = (Vec::with_capacity(BLOCK_BYTES), Vec::new());
    for name in names {
        let name_offset = names.len() * DIRENT + text.len();
        let child = match name {
            DirName::Edge(edge) => {
                text.extend(tree.name(edge)?);
                edge.child
            }
            DirName::Dots(count, id) => {
                text.extend(&b".."[..*count]);
                *id
            }
        };
        entries.extend(format::encode_dirent(
            numbers[child as usize].into(),
            name_offset,
            tree.file_type(child),
        ));
    }
    entries.extend(text);
    Ok(entries)
}
