//! [`Tree`]: names and inodes of a layer, built entry by entry; later entries replace earlier ones.
//!
//! Contains no file content, only its position. Nodes and names are in [`Store`]s; only an index of directory entries is in
//! memory: 16 bytes an entry, and while the tree grows 8 to 16 more for the hash table.
//!
//! Names are resolved inside the layer: a symbolic link in a path is followed as in a container with this root. A link that
//! climbs above the root is rejected, as are `..`, absolute names and NULs in names.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::Path;

use super::data::Blob;
use super::format::{self, FileType};
use super::node::{Node, NodeId, Nodes};
use super::store::Store;
use super::tar::Entry;
use super::{
    MAX_ALL_NAMES_BYTES, MAX_DEPTH, MAX_ENTRIES, MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_STEPS,
    MAX_XATTR_BYTES,
};

/// Maximum number of symbolic links followed in one path, as in Linux.
const MAX_LINKS: usize = 40;
/// Prefix that deletes a name of the lower layers.
const WHITEOUT: &[u8] = b".wh.";
/// Deletes all names of the lower layers in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of AUFS metadata that has no meaning for the tree.
const AUFS: &[u8] = b".wh..wh.";
/// Directories with more entries are sorted in several passes, to bound the memory of the names.
const SORT_ENTRIES: usize = 16 << 10;

pub(crate) const ROOT: NodeId = 0;
/// Child of a directory entry that is only a whiteout.
const NO_NODE: NodeId = NodeId::MAX;

/// Reason why an entry was not added to the tree.
#[derive(Debug)]
pub(crate) enum TreeError {
    /// The entry is not acceptable.
    Invalid(String),
    /// A temporary file could not be read or written.
    Io(io::Error),
}

impl From<String> for TreeError {
    fn from(reason: String) -> Self {
        Self::Invalid(reason)
    }
}

impl From<io::Error> for TreeError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

type Result<T> = std::result::Result<T, TreeError>;

/// A directory entry. The name is in the tree's bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Edge {
    parent: NodeId,
    pub child: NodeId,
    offset: u32,
    /// First bytes of the name, 0 behind its end.
    first: [u8; 2],
    length: u8,
    /// True if the layer deletes this name of the lower layers.
    whiteout: bool,
}

impl Edge {
    /// Bytes of the name.
    pub(crate) fn name_length(&self) -> usize {
        usize::from(self.length)
    }

    /// Compares the name to `.` or `..`, which no edge has.
    pub(crate) fn is_before_dots(&self, dots: usize) -> bool {
        let dots = &b".."[..dots];
        self.first[..dots.len()] < *dots
    }
}

/// A slot of the hash table: hash of parent and name, and index of the edge.
type Slot = (u32, u32);
const FREE: Slot = (0, u32::MAX);

/// Names and inodes of a layer.
pub(crate) struct Tree {
    nodes: Nodes,
    opaque: Vec<bool>,
    /// By node: a directory without an entry; of the root: the layer has such directories.
    implicit: Vec<bool>,
    edges: Vec<Edge>,
    /// Open addressing; its length is a power of two and at least twice the number of edges.
    table: Vec<Slot>,
    hasher: RandomState,
    /// Names, targets and encoded attributes.
    bytes: Store,
    name_bytes: usize,
    /// Path components resolved so far.
    steps: u64,
    /// The last resolved directory of an entry's path, and of a hard link's target.
    resolved: [Option<(Vec<u8>, NodeId)>; 2],
}

/// The position of a name.
pub(crate) enum Name {
    Root,
    /// Directory and name in it.
    Child(NodeId, Vec<u8>),
}

impl Tree {
    /// Creates a tree of only the root; `directory` is for temporary files.
    pub(crate) fn new(directory: &Path) -> io::Result<Self> {
        let mut nodes = Nodes::new(Store::new(directory));
        nodes.push(&implicit_dir())?;
        Ok(Self {
            nodes,
            opaque: vec![false],
            implicit: vec![false],
            edges: Vec::new(),
            table: vec![FREE; 64],
            hasher: RandomState::new(),
            bytes: Store::new(directory),
            name_bytes: 0,
            steps: 0,
            resolved: [None, None],
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn node(&self, id: NodeId) -> io::Result<Node> {
        self.nodes.get(id)
    }

    pub(crate) fn file_type(&self, id: NodeId) -> FileType {
        self.nodes.file_type(id)
    }

    /// Resolves an entry's name to its directory, creating missing directories.
    pub(crate) fn locate(&mut self, name: &[u8]) -> Result<Name> {
        let mut parts = parts(name)?;
        let Some(last) = parts.pop() else {
            return Ok(Name::Root);
        };
        let parent = self.directory(&parts, true)?;
        Ok(Name::Child(parent, last.to_vec()))
    }

    /// Sets the metadata of the root directory.
    pub(crate) fn set_root(&mut self, entry: &Entry) -> Result<()> {
        let root = self.describe(entry, Node::new(FileType::Dir, 0))?;
        Ok(self.nodes.set(ROOT, &root)?)
    }

    /// Adds an entry to its directory. An existing directory keeps its entries; anything else is replaced.
    pub(crate) fn insert(
        &mut self,
        parent: NodeId,
        name: &[u8],
        entry: &Entry,
        mut node: Node,
    ) -> Result<()> {
        node = self.describe(entry, node)?;
        if node.file_type == FileType::Dir
            && let Some(existing) = self.child(parent, name)?
            && self.file_type(existing) == FileType::Dir
        {
            self.implicit[existing as usize] = false;
            return Ok(self.nodes.set(existing, &node)?);
        }
        if node.file_type == FileType::Symlink {
            node.target = self.keep(&entry.link)?;
        }
        let id = self.push(&node)?;
        self.set_child(parent, name, id)
    }

    /// Adds a name for the file named `target`.
    pub(crate) fn link(&mut self, parent: NodeId, name: &[u8], target: &[u8]) -> Result<()> {
        let id = self.link_target(target).map_err(|error| match error {
            TreeError::Invalid(reason) => {
                let target = super::show(target);
                TreeError::Invalid(format!("hard link target {target:?}: {reason}"))
            }
            error => error,
        })?;
        if self.child(parent, name)? == Some(id) {
            return Ok(());
        }
        self.set_child(parent, name, id)
    }

    fn link_target(&mut self, target: &[u8]) -> Result<NodeId> {
        let is_a_directory = || TreeError::Invalid("is a directory".into());
        let mut parts = parts(target)?;
        let last = parts.pop().ok_or_else(is_a_directory)?;
        let directory = self.directory(&parts, false)?;
        let missing = || TreeError::Invalid("is not in this layer".into());
        let id = self.child(directory, last)?.ok_or_else(missing)?;
        if self.file_type(id) == FileType::Dir {
            return Err(is_a_directory());
        }
        Ok(id)
    }

    /// Records an entry `.wh.…`.
    pub(crate) fn white_out(&mut self, parent: NodeId, name: &[u8]) -> Result<()> {
        if name == OPAQUE {
            self.opaque[parent as usize] = true;
            return Ok(());
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(TreeError::Invalid("whiteout of nothing".into()));
        }
        let index = match self.find(parent, hidden)? {
            Some(index) => index,
            None => self.add_edge(parent, hidden, NO_NODE)?,
        };
        self.edges[index as usize].whiteout = true;
        Ok(())
    }

    /// Resolves the directory of a path. A tar stream usually names many entries of one directory in a row.
    fn directory(&mut self, parts: &[&[u8]], create: bool) -> Result<NodeId> {
        let path = parts.join(&b'/');
        match &self.resolved[usize::from(create)] {
            Some((resolved, id)) if *resolved == path => Ok(*id),
            _ => {
                let id = self.walk(parts, create)?;
                self.resolved[usize::from(create)] = Some((path, id));
                Ok(id)
            }
        }
    }

    /// Follows `parts` from the root to a directory; creates missing ones if `create`.
    fn walk(&mut self, parts: &[&[u8]], create: bool) -> Result<NodeId> {
        let invalid = |reason: String| Err(TreeError::Invalid(reason));
        let mut path = vec![ROOT];
        let mut rest: Vec<Vec<u8>> = parts.iter().rev().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(part) = rest.pop() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return invalid(format!(
                    "paths of the layer have more than {MAX_STEPS} components"
                ));
            }
            let here = path.last().copied().unwrap_or(ROOT);
            match part.as_slice() {
                b"" | b"." => continue,
                // Only in a link's target: parts() rejects it.
                b".." if path.len() > 1 => {
                    path.pop();
                    continue;
                }
                b".." => {
                    return invalid("a symbolic link in its path leads out of the tree".into());
                }
                _ => {}
            }
            let child = match self.child(here, &part)? {
                Some(child) => child,
                None if create => {
                    if part.len() > MAX_NAME_BYTES {
                        return invalid(format!(
                            "a name in its path has more than {MAX_NAME_BYTES} bytes"
                        ));
                    }
                    let id = self.push(&implicit_dir())?;
                    self.implicit[id as usize] = true;
                    self.implicit[ROOT as usize] = true;
                    self.set_child(here, &part, id)?;
                    id
                }
                None => {
                    let part = super::show(&part);
                    return invalid(format!("{part:?} in its path is not in this layer"));
                }
            };
            match self.file_type(child) {
                FileType::Dir => path.push(child),
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return invalid("too many symbolic links in its path".into());
                    }
                    let target = self.read(self.nodes.get(child)?.target)?;
                    if target.starts_with(b"/") {
                        path.truncate(1);
                    }
                    rest.extend(target.rsplit(|&b| b == b'/').map(<[u8]>::to_vec));
                }
                _ => {
                    let part = super::show(&part);
                    return invalid(format!("{part:?} in its path is not a directory"));
                }
            }
            if path.len() > MAX_DEPTH {
                return invalid(format!("it is deeper than {MAX_DEPTH} directories"));
            }
        }
        Ok(path.last().copied().unwrap_or(ROOT))
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> io::Result<Option<NodeId>> {
        let found = self.find(directory, name)?;
        let child = found.map(|index| self.edges[index as usize].child);
        Ok(child.filter(|child| *child != NO_NODE))
    }

    fn hash(&self, parent: NodeId, name: &[u8]) -> u32 {
        self.hasher.hash_one((parent, name)) as u32
    }

    /// Index of the edge with this name.
    fn find(&self, parent: NodeId, name: &[u8]) -> io::Result<Option<u32>> {
        let hash = self.hash(parent, name);
        let mask = self.table.len() - 1;
        let mut at = hash as usize & mask;
        while self.table[at] != FREE {
            let (other, index) = self.table[at];
            let edge = &self.edges[index as usize];
            if other == hash
                && (edge.parent, edge.name_length()) == (parent, name.len())
                && self.name(edge)? == name
            {
                return Ok(Some(index));
            }
            at = (at + 1) & mask;
        }
        Ok(None)
    }

    /// The name of an edge.
    pub(crate) fn name(&self, edge: &Edge) -> io::Result<Vec<u8>> {
        name(&self.bytes, edge)
    }

    fn set_child(&mut self, parent: NodeId, name: &[u8], child: NodeId) -> Result<()> {
        match self.find(parent, name)? {
            Some(index) => {
                self.edges[index as usize].child = child;
                // The replaced node may have been a part of these paths.
                self.resolved = [None, None];
            }
            None => drop(self.add_edge(parent, name, child)?),
        }
        Ok(())
    }

    fn add_edge(&mut self, parent: NodeId, name: &[u8], child: NodeId) -> Result<u32> {
        if self.edges.len() >= MAX_ENTRIES {
            let reason = format!("the layer has more than {MAX_ENTRIES} names");
            return Err(TreeError::Invalid(reason));
        }
        let hash = self.hash(parent, name);
        let kept = self.keep(name)?;
        let index = self.edges.len() as u32;
        self.edges.push(Edge {
            parent,
            child,
            offset: kept.offset as u32,
            first: [0, 1].map(|at| name.get(at).copied().unwrap_or(0)),
            // MAX_NAME_BYTES is 255.
            length: name.len() as u8,
            whiteout: false,
        });
        if self.edges.len() * 2 > self.table.len() {
            let larger = vec![FREE; self.table.len() * 2];
            for slot in std::mem::replace(&mut self.table, larger) {
                if slot != FREE {
                    occupy(&mut self.table, slot);
                }
            }
        }
        occupy(&mut self.table, (hash, index));
        Ok(index)
    }

    fn push(&mut self, node: &Node) -> Result<NodeId> {
        if self.nodes.len() >= MAX_ENTRIES {
            let reason = format!("the layer has more than {MAX_ENTRIES} entries");
            return Err(TreeError::Invalid(reason));
        }
        self.opaque.push(false);
        self.implicit.push(false);
        Ok(self.nodes.push(node)?)
    }

    /// Appends to the tree's bytes.
    fn keep(&mut self, bytes: &[u8]) -> Result<Blob> {
        self.name_bytes += bytes.len();
        if self.name_bytes > MAX_ALL_NAMES_BYTES {
            return Err(TreeError::Invalid(format!(
                "names, links and attributes of the layer have more than {MAX_ALL_NAMES_BYTES} bytes"
            )));
        }
        Ok(Blob {
            offset: self.bytes.append(bytes)?,
            length: bytes.len() as u32,
        })
    }

    fn read(&self, blob: Blob) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; blob.length as usize];
        self.bytes.read_at(blob.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Adds an entry's metadata to its node.
    fn describe(&mut self, entry: &Entry, mut node: Node) -> Result<Node> {
        let (mut encoded, mut bytes) = (Vec::new(), 0);
        for (key, value) in &entry.xattrs {
            let Some((prefix, name)) = xattr_name(key) else {
                continue;
            };
            if name.len() > MAX_NAME_BYTES || value.len() > usize::from(u16::MAX) {
                let key = super::show(key);
                return Err(TreeError::Invalid(format!("attribute {key:?} is too long")));
            }
            bytes += key.len() + value.len();
            if bytes > MAX_XATTR_BYTES {
                return Err(TreeError::Invalid(format!(
                    "its attributes have more than {MAX_XATTR_BYTES} bytes"
                )));
            }
            format::encode_xattr(&mut encoded, prefix, name, value);
        }
        node.xattrs = self.keep(&encoded)?;
        (node.mode, node.uid, node.gid) = (entry.mode, entry.uid, entry.gid);
        node.mtime = entry.mtime;
        Ok(node)
    }

    /// Converts whiteouts to the form of overlayfs, a device 0:0 or an opaque directory if the name exists, and sorts the
    /// edges by directory and name. No entry may be added afterwards.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.table = Vec::new();
        // One inode for all of them: overlayfs hard-links its own whiteouts, too.
        let mut device = None;
        for index in 0..self.edges.len() {
            let edge = self.edges[index];
            if edge.child == NO_NODE {
                let whiteout = match device {
                    Some(id) => id,
                    None => self.push(&Node::new(FileType::Char, 0))?,
                };
                device = Some(whiteout);
                self.edges[index].child = whiteout;
            } else if edge.whiteout && self.file_type(edge.child) == FileType::Dir {
                self.opaque[edge.child as usize] = true;
            }
        }
        self.edges.sort_unstable_by_key(|edge| edge.parent);
        for directory in self.edges.chunk_by_mut(|a, b| a.parent == b.parent) {
            sort_names(&self.bytes, directory, 0)?;
        }
        Ok(())
    }

    /// Entries of a directory, sorted by name. Directories must be passed in ascending order, with the same cursor,
    /// which is 0 at the beginning.
    pub(crate) fn edges_of(&self, directory: NodeId, cursor: &mut usize) -> &[Edge] {
        let skipped = self.edges[*cursor..].partition_point(|edge| edge.parent < directory);
        let start = *cursor + skipped;
        let length = self.edges[start..]
            .iter()
            .take_while(|edge| edge.parent == directory)
            .count();
        *cursor = start + length;
        &self.edges[start..start + length]
    }

    /// Encoded attributes of a node.
    pub(crate) fn xattrs(&self, id: NodeId, node: &Node) -> io::Result<Vec<u8>> {
        let mut encoded = self.read(node.xattrs)?;
        for name in self.marks(id) {
            format::encode_xattr(&mut encoded, TRUSTED, name, b"y");
        }
        Ok(encoded)
    }

    /// Length of [`Self::xattrs`].
    pub(crate) fn xattrs_length(&self, id: NodeId, node: &Node) -> usize {
        let marks = self.marks(id);
        let marks: usize = marks.map(|name| format::xattr_length(name, b"y")).sum();
        node.xattrs.length as usize + marks
    }

    /// Names of the attributes that mark a directory.
    fn marks(&self, id: NodeId) -> impl Iterator<Item = &'static [u8]> {
        let opaque = self.opaque[id as usize].then_some(OVERLAY_OPAQUE);
        let implicit = self.implicit[id as usize].then_some(IMPLICIT);
        opaque.into_iter().chain(implicit)
    }
}

fn occupy(table: &mut [Slot], slot: Slot) {
    let mask = table.len() - 1;
    let mut at = slot.0 as usize & mask;
    while table[at] != FREE {
        at = (at + 1) & mask;
    }
    table[at] = slot;
}

fn name(bytes: &Store, edge: &Edge) -> io::Result<Vec<u8>> {
    let mut name = vec![0; edge.name_length()];
    bytes.read_at(edge.offset.into(), &mut name)?;
    Ok(name)
}

/// Sorts edges by name; their first `depth` bytes are equal. Names have no NUL, so 0 marks their end.
fn sort_names(bytes: &Store, edges: &mut [Edge], depth: usize) -> io::Result<()> {
    const KEY_BYTES: usize = 8;
    let mut failed = None;
    if edges.len() <= SORT_ENTRIES {
        edges.sort_by_cached_key(|edge| {
            name(bytes, edge).unwrap_or_else(|error| {
                failed = Some(error);
                Vec::new()
            })
        });
        return failed.map_or(Ok(()), Err);
    }
    let key = |edge: &Edge| -> io::Result<[u8; KEY_BYTES]> {
        let mut key = [0; KEY_BYTES];
        let length = edge.name_length().saturating_sub(depth).min(KEY_BYTES);
        bytes.read_at(u64::from(edge.offset) + depth as u64, &mut key[..length])?;
        Ok(key)
    };
    edges.sort_by_cached_key(|edge| {
        key(edge).unwrap_or_else(|error| {
            failed = Some(error);
            [0; KEY_BYTES]
        })
    });
    if let Some(error) = failed {
        return Err(error);
    }
    let mut start = 0;
    while start < edges.len() {
        let first = key(&edges[start])?;
        let mut end = start + 1;
        while end < edges.len() && key(&edges[end])? == first {
            end += 1;
        }
        // Names are unique, so the recursion ends at the latest where they end.
        if end - start > 1 && depth <= MAX_NAME_BYTES {
            sort_names(bytes, &mut edges[start..end], depth + KEY_BYTES)?;
        }
        start = end;
    }
    Ok(())
}

/// A directory that no entry describes.
fn implicit_dir() -> Node {
    Node::new(FileType::Dir, 0o755)
}

/// Components of an entry's name; none for the root.
fn parts(name: &[u8]) -> std::result::Result<Vec<&[u8]>, String> {
    if name.contains(&0) {
        return Err("the name contains a NUL".into());
    }
    if name.len() > MAX_PATH_BYTES {
        return Err(format!("the name has more than {MAX_PATH_BYTES} bytes"));
    }
    if name.is_empty() {
        return Err("the name is empty".into());
    }
    let parts: Vec<&[u8]> = name
        .split(|&b| b == b'/')
        .filter(|p| !matches!(*p, b"" | b"."))
        .collect();
    if parts.contains(&&b".."[..]) {
        return Err("the name contains \"..\"".into());
    }
    // Some builders name the root "/", which is harmless.
    if name.starts_with(b"/") && !parts.is_empty() {
        return Err("the name is absolute".into());
    }
    if parts.iter().any(|p| p.len() > MAX_NAME_BYTES) {
        return Err(format!(
            "a component of the name has more than {MAX_NAME_BYTES} bytes"
        ));
    }
    Ok(parts)
}

/// EROFS's number of the prefix `trusted.`.
const TRUSTED: u8 = 4;
/// Marks an opaque directory for overlayfs, behind the prefix.
const OVERLAY_OPAQUE: &[u8] = b"overlay.opaque";
/// Marks a directory without an entry, and the root of a layer that has any, for the agent, which gives the directory the
/// attributes of lower layers.
const IMPLICIT: &[u8] = b"boxlite.implicit";

/// Number of the prefix and rest of an attribute's name; `None` for attributes that a guest cannot or must not get.
fn xattr_name(key: &[u8]) -> Option<(u8, &[u8])> {
    match key {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let prefixes: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", TRUSTED), (b"security.", 6)];
    let (number, rest) = prefixes
        .iter()
        .find_map(|(prefix, number)| Some((*number, key.strip_prefix(*prefix)?)))?;
    let overlay = number == TRUSTED && rest.starts_with(b"overlay.");
    if rest.is_empty() || overlay || rest.contains(&0) {
        None
    } else {
        Some((number, rest))
    }
}
