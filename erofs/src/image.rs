//! The end of an image: places the inodes, then writes them, the directories and the superblock.
//!
//! Contents are in their blocks already, see `data`. Two passes over the same list of inodes: the first decides where
//! each lies, since directories name their entries by place; the second writes, in that order, with nothing kept.
//!
//! An inode lies on a slot of 32 bytes, never across a block's end; behind it its attributes, then either its map of
//! chunks or its tail, which must not cross a block's end either.

use super::data::{Data, DataWriter, MAX_TAIL, Run, Tail};
use super::format::{
    self, BLOCK, DIRENT, FileType, HOLE, INODE, InodeRecord, Layout, SLOT, Superblock,
};
use super::tree::{Kind, Node, NodeId, ROOT, Tree};
use super::{ErofsError, ErofsResult};

/// Where the root's inode lies in the metadata. Not at 0, since some programs take inode number 0 for a deleted file.
const ROOT_POSITION: u64 = 2 * SLOT;
/// Metadata gathered before it is written, in bytes; a multiple of the block.
const FLUSH: usize = 1 << 20;

/// An inode that made it into the image.
struct Placed {
    id: NodeId,
    /// Byte in the metadata.
    position: u64,
    links: u32,
    /// The parent, for a directory's `..`.
    parent: NodeId,
    /// First directory block, counted from the first of all, for a directory that has some.
    dir_block: u32,
}

/// The first pass's result.
struct Plan {
    placed: Vec<Placed>,
    /// Inode number by node; 0 for what is not in the image.
    numbers: Vec<u64>,
    /// Length of the metadata.
    length: u64,
}

/// What stands behind an inode and its attributes.
enum Behind<'a> {
    Nothing,
    Tail(Tail),
    Chunks {
        size: u64,
        bits: u32,
        runs: &'a [Run],
    },
    /// A directory's: its length, and whether the rest of it is put here.
    Dir {
        length: u64,
        inline: usize,
    },
}

/// Writes everything that `tree` says behind what `data` has written. The file is complete then, but not synced.
pub(super) fn write(mut tree: Tree, mut data: DataWriter<'_>) -> ErofsResult<()> {
    tree.finish().map_err(|reason| ErofsError::Invalid {
        what: "the layer".into(),
        reason,
    })?;
    let plan = place(&tree);
    let meta_block = data.next_block();
    let meta_blocks = plan.length.div_ceil(BLOCK as u64);
    let too_large = || ErofsError::TooLarge {
        what: "a layer's metadata".into(),
        limit: u64::from(HOLE),
        unit: "blocks",
    };
    let dirs_block = u32::try_from(meta_blocks)
        .ok()
        .and_then(|m| meta_block.checked_add(m))
        .ok_or_else(too_large)?;
    write_inodes(&tree, &plan, &mut data, dirs_block)?;
    let mut buffer = Vec::new();
    for placed in &plan.placed {
        if let Kind::Dir(_) = tree.node(placed.id).kind {
            let (length, inline) = dir_length(&tree, placed);
            if length as usize > inline {
                encode_dir(&tree, placed, &plan.numbers, &mut buffer);
                data.append(&buffer[..length as usize - inline])?;
                buffer.clear();
            }
        }
    }
    let superblock = Superblock {
        root_nid: (ROOT_POSITION / SLOT) as u16,
        inodes: plan.placed.len() as u64,
        blocks: data.next_block(),
        meta_block,
        chunked: plan
            .placed
            .iter()
            .any(|p| matches!(tree.node(p.id).kind, Kind::File(Data::Chunked { .. }))),
    };
    data.finish(&superblock.encode())
}

/// Finds what is still in the tree, in the order in which it came, and gives each its place.
fn place(tree: &Tree) -> Plan {
    let mut links = vec![0u32; tree.len()];
    let mut parents = vec![ROOT; tree.len()];
    let mut todo = vec![ROOT];
    links[ROOT as usize] = 2;
    while let Some(id) = todo.pop() {
        let Kind::Dir(dir) = &tree.node(id).kind else {
            continue;
        };
        for &child in dir.entries.values() {
            if let Kind::Dir(_) = tree.node(child).kind {
                links[child as usize] = 2;
                links[id as usize] += 1;
                parents[child as usize] = id;
                todo.push(child);
            } else {
                links[child as usize] += 1;
            }
        }
    }
    let mut plan = Plan {
        placed: Vec::new(),
        numbers: vec![0; tree.len()],
        length: ROOT_POSITION,
    };
    let mut dir_blocks = 0;
    for id in (0..tree.len() as NodeId).filter(|&id| links[id as usize] > 0) {
        let index = id as usize;
        let mut placed = Placed {
            id,
            position: 0,
            links: links[index],
            parent: parents[index],
            dir_block: dir_blocks,
        };
        let node = tree.node(id);
        let head = (INODE + xattr_bytes(node)) as u64;
        let (tail, more) = match behind(tree, &placed) {
            Behind::Nothing => (0, 0),
            Behind::Tail(tail) => (u64::from(tail.length), 0),
            Behind::Chunks { size, bits, .. } => (0, 4 * chunk_count(size, bits)),
            Behind::Dir { length, inline } => {
                dir_blocks += (length - inline as u64).div_ceil(BLOCK as u64) as u32;
                (inline as u64, 0)
            }
        };
        placed.position = fit(plan.length, head, tail);
        plan.length = placed.position + head + tail + more;
        plan.numbers[index] = placed.position / SLOT;
        plan.placed.push(placed);
    }
    // fsck.erofs 1.5 reads an attribute header behind every inode, also where none is: the file must go on there.
    plan.length += SLOT;
    plan
}

/// The first slot from `from` on where neither the inode nor its tail crosses a block's end.
fn fit(from: u64, head: u64, tail: u64) -> u64 {
    let block = BLOCK as u64;
    let mut position = from.next_multiple_of(SLOT);
    // Ends: with tails of at most half a block, one of the 128 slots of a block always fits.
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
) -> ErofsResult<()> {
    let mut out: Vec<u8> = Vec::with_capacity(FLUSH + BLOCK);
    let mut dir = Vec::new();
    // Bytes of the metadata that are written already.
    let mut written = 0;
    for (number, placed) in plan.placed.iter().enumerate() {
        out.resize((placed.position - written) as usize, 0);
        let node = tree.node(placed.id);
        let behind = behind(tree, placed);
        out.extend(record(node, placed, &behind, number as u32 + 1, dirs_block).encode());
        let xattrs = node
            .meta
            .xattrs
            .iter()
            .map(|x| (x.prefix, x.name.as_slice(), x.value.as_slice()));
        format::encode_xattrs(&mut out, xattrs);
        match behind {
            Behind::Nothing => {}
            Behind::Tail(tail) => data.tail(tail, &mut out)?,
            Behind::Chunks { size, bits, runs } => chunk_map(&mut out, size, bits, runs),
            Behind::Dir { length, inline } => {
                if inline > 0 {
                    encode_dir(tree, placed, &plan.numbers, &mut dir);
                    out.extend(&dir[length as usize - inline..]);
                    dir.clear();
                }
            }
        }
        if out.len() >= FLUSH {
            let whole = out.len() - out.len() % BLOCK;
            data.append(&out[..whole])?;
            out.drain(..whole);
            written += whole as u64;
        }
    }
    out.resize((plan.length - written) as usize, 0);
    data.append(&out).map(drop)
}

fn record(
    node: &Node,
    placed: &Placed,
    behind: &Behind<'_>,
    number: u32,
    dirs_block: u32,
) -> InodeRecord {
    let (layout, size, union) = match (behind, &node.kind) {
        (Behind::Dir { length, inline }, _) => {
            let layout = if *inline > 0 {
                Layout::Inline
            } else {
                Layout::Plain
            };
            (layout, *length, dirs_block + placed.dir_block)
        }
        (Behind::Chunks { size, bits, .. }, _) => {
            (Layout::Chunked, *size, format::chunk_format(*bits))
        }
        (_, Kind::Char(device) | Kind::Block(device)) => (Layout::Plain, 0, *device),
        (behind, Kind::File(content) | Kind::Symlink(_, content)) => {
            let layout = if matches!(behind, Behind::Tail(_)) {
                Layout::Inline
            } else {
                Layout::Plain
            };
            let block = if let Data::Flat { block, .. } = content {
                *block
            } else {
                0
            };
            (layout, content.size(), block)
        }
        (_, Kind::Dir(_) | Kind::Fifo) => (Layout::Plain, 0, 0),
    };
    InodeRecord {
        layout,
        xattr_bytes: xattr_bytes(node),
        mode: file_type(node).mode() | node.meta.mode,
        size,
        union,
        number,
        uid: node.meta.uid,
        gid: node.meta.gid,
        mtime: node.meta.mtime,
        links: placed.links,
    }
}

fn behind<'a>(tree: &'a Tree, placed: &Placed) -> Behind<'a> {
    match &tree.node(placed.id).kind {
        Kind::Dir(_) => {
            let (length, inline) = dir_length(tree, placed);
            Behind::Dir { length, inline }
        }
        Kind::File(Data::Chunked { size, bits, runs }) => Behind::Chunks {
            size: *size,
            bits: *bits,
            runs,
        },
        Kind::File(Data::Flat {
            tail: Some(tail), ..
        })
        | Kind::Symlink(
            _,
            Data::Flat {
                tail: Some(tail), ..
            },
        ) => Behind::Tail(*tail),
        _ => Behind::Nothing,
    }
}

fn file_type(node: &Node) -> FileType {
    match node.kind {
        Kind::Dir(_) => FileType::Dir,
        Kind::File(_) => FileType::Regular,
        Kind::Symlink(..) => FileType::Symlink,
        Kind::Char(_) => FileType::Char,
        Kind::Block(_) => FileType::Block,
        Kind::Fifo => FileType::Fifo,
    }
}

fn xattr_bytes(node: &Node) -> usize {
    format::xattr_bytes(
        node.meta
            .xattrs
            .iter()
            .map(|x| (x.name.as_slice(), x.value.as_slice())),
    )
}

fn chunk_count(size: u64, bits: u32) -> u64 {
    size.div_ceil(1 << bits)
}

/// Appends the address of each chunk.
fn chunk_map(out: &mut Vec<u8>, size: u64, bits: u32, runs: &[Run]) {
    let blocks_per_chunk = (1u64 << bits) / BLOCK as u64;
    let mut at = 0;
    for run in runs {
        (at..run.chunk).for_each(|_| out.extend(HOLE.to_le_bytes()));
        for chunk in 0..run.chunks {
            out.extend((run.block + (chunk * blocks_per_chunk) as u32).to_le_bytes());
        }
        at = run.chunk + run.chunks;
    }
    (at..chunk_count(size, bits)).for_each(|_| out.extend(HOLE.to_le_bytes()));
}

/// A directory's names in their order on disk, `.` and `..` among them.
fn names<'a>(tree: &'a Tree, placed: &Placed) -> Vec<(&'a [u8], NodeId)> {
    let Kind::Dir(dir) = &tree.node(placed.id).kind else {
        return Vec::new();
    };
    let mut names: Vec<(&[u8], NodeId)> = dir
        .entries
        .iter()
        .map(|(name, id)| (name.as_ref(), *id))
        .collect();
    for (name, id) in [(&b"."[..], placed.id), (&b".."[..], placed.parent)] {
        names.insert(
            names.partition_point(|(other, _)| *other < name),
            (name, id),
        );
    }
    names
}

/// Splits names into blocks: as many as fit with their entries.
fn blocks<'n, 'a>(
    names: &'n [(&'a [u8], NodeId)],
) -> impl Iterator<Item = &'n [(&'a [u8], NodeId)]> {
    let mut rest = names;
    std::iter::from_fn(move || {
        let mut used = 0;
        let fits = rest.iter().take_while(|(name, _)| {
            used += DIRENT + name.len();
            used <= BLOCK
        });
        let (block, after) = rest.split_at(fits.count());
        rest = after;
        if block.is_empty() { None } else { Some(block) }
    })
}

/// A directory's length, and how much of it stands beside its inode.
fn dir_length(tree: &Tree, placed: &Placed) -> (u64, usize) {
    let names = names(tree, placed);
    let (mut count, mut last) = (0, 0);
    for block in blocks(&names) {
        count += 1;
        last = block.iter().map(|(name, _)| DIRENT + name.len()).sum();
    }
    let length = ((count - 1) * BLOCK + last) as u64;
    (length, if last <= MAX_TAIL { last } else { 0 })
}

/// Appends a directory's content.
fn encode_dir(tree: &Tree, placed: &Placed, numbers: &[u64], out: &mut Vec<u8>) {
    let names = names(tree, placed);
    for block in blocks(&names) {
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        let mut name_offset = block.len() * DIRENT;
        for (name, id) in block {
            let node = tree.node(*id);
            out.extend(format::encode_dirent(
                numbers[*id as usize],
                name_offset,
                file_type(node),
            ));
            name_offset += name.len();
        }
        block.iter().for_each(|(name, _)| out.extend(*name));
    }
}
