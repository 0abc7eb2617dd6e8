//! [`Tree`]: a layer's names and inodes in memory, built entry by entry, later entries winning.
//!
//! Holds no file content, only where it lies. Called by `erofs` for each entry and by `image` at the end.
//!
//! Names are resolved inside the layer: a symbolic link on the way to an entry is followed as the root of a container
//! would, and one that climbs above the root is refused, as are `..`, absolute names and NULs in names.

use std::collections::{BTreeMap, BTreeSet};

use super::data::Data;
use super::tar::Entry;
use super::{MAX_DEPTH, MAX_ENTRIES, MAX_NAME, MAX_NAME_BYTES, MAX_PATH, MAX_XATTR_BYTES};

/// Symbolic links followed for one name, as in Linux.
const MAX_LINKS: usize = 40;
/// Marks a name of lower layers as gone.
const WHITEOUT: &[u8] = b".wh.";
/// Marks all names of lower layers in its directory as gone.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other marks of AUFS, which say nothing about the tree.
const AUFS: &[u8] = b".wh..wh.";

/// Index of a node.
pub(super) type NodeId = u32;
pub(super) const ROOT: NodeId = 0;

/// An extended attribute as EROFS stores it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Xattr {
    /// EROFS's number of the name's prefix.
    pub prefix: u8,
    /// The name behind the prefix, at most 255 bytes.
    pub name: Vec<u8>,
    /// At most 65,535 bytes.
    pub value: Vec<u8>,
}

/// What every inode has.
#[derive(Debug, Clone, Default)]
pub(super) struct Meta {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub xattrs: Vec<Xattr>,
}

/// What an inode is.
#[derive(Debug)]
pub(super) enum Kind {
    Dir(Box<Dir>),
    File(Data),
    /// The target, and where it lies.
    Symlink(Box<[u8]>, Data),
    Char(u32),
    Block(u32),
    Fifo,
}

#[derive(Debug, Default)]
pub(super) struct Dir {
    pub entries: BTreeMap<Box<[u8]>, NodeId>,
    /// Names of lower layers that are gone.
    whiteouts: BTreeSet<Box<[u8]>>,
    pub opaque: bool,
}

#[derive(Debug)]
pub(super) struct Node {
    pub meta: Meta,
    pub kind: Kind,
}

/// See the module's header.
pub(super) struct Tree {
    nodes: Vec<Node>,
    /// Names, targets and xattrs kept so far, in bytes.
    name_bytes: usize,
    /// Directory entries and whiteouts made so far.
    names: usize,
}

/// Where a name leads.
pub(super) enum Name {
    Root,
    /// The directory, and the name in it.
    Child(NodeId, Vec<u8>),
}

impl Tree {
    pub(super) fn new() -> Self {
        Self {
            nodes: vec![implicit_dir()],
            name_bytes: 0,
            names: 0,
        }
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Finds the directory of an entry's name, making what is missing on the way.
    pub(super) fn locate(&mut self, name: &[u8]) -> Result<Name, String> {
        let mut parts = parts(name)?;
        let Some(last) = parts.pop() else {
            return Ok(Name::Root);
        };
        let last = last.to_vec();
        let parent = self.walk(&parts, true)?;
        Ok(Name::Child(parent, last))
    }

    /// The entry of the root directory itself.
    pub(super) fn set_root(&mut self, entry: &Entry) -> Result<(), String> {
        self.nodes[ROOT as usize].meta = self.meta(entry)?;
        Ok(())
    }

    /// Puts an entry into its directory. A directory that is there already keeps its content; anything else makes way.
    pub(super) fn insert(
        &mut self,
        parent: NodeId,
        name: Vec<u8>,
        entry: &Entry,
        kind: Kind,
    ) -> Result<(), String> {
        let meta = self.meta(entry)?;
        if let (Kind::Dir(_), Some(there)) = (&kind, self.child(parent, &name))
            && matches!(self.node(there).kind, Kind::Dir(_))
        {
            self.nodes[there as usize].meta = meta;
            return Ok(());
        }
        if let Kind::Symlink(target, _) = &kind {
            self.count_bytes(target.len())?;
        }
        let id = self.push(Node { meta, kind })?;
        self.set_child(parent, name, id)
    }

    /// Gives the file that `target` names one more name.
    pub(super) fn link(
        &mut self,
        parent: NodeId,
        name: Vec<u8>,
        target: &[u8],
    ) -> Result<(), String> {
        let shown = super::show(target);
        let of_target = |reason: String| format!("the hard link's target {shown:?}: {reason}");
        let mut parts = parts(target).map_err(of_target)?;
        let Some(last) = parts.pop() else {
            return Err(of_target("is a directory".into()));
        };
        let last = last.to_vec();
        let dir = self.walk(&parts, false).map_err(of_target)?;
        let missing = || of_target("is not in this layer".into());
        let id = self.child(dir, &last).ok_or_else(missing)?;
        if matches!(self.node(id).kind, Kind::Dir(_)) {
            return Err(of_target("is a directory".into()));
        }
        if self.child(parent, &name) == Some(id) {
            return Ok(());
        }
        self.set_child(parent, name, id)
    }

    /// Notes an entry `.wh.…`.
    pub(super) fn white_out(&mut self, parent: NodeId, name: &[u8]) -> Result<(), String> {
        if name == OPAQUE {
            self.dir_mut(parent).opaque = true;
            return Ok(());
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        let hidden = &name[WHITEOUT.len()..];
        if matches!(hidden, b"" | b"." | b"..") {
            return Err("it is a whiteout of nothing".into());
        }
        self.count_name(hidden.len())?;
        self.dir_mut(parent).whiteouts.insert(hidden.into());
        Ok(())
    }

    /// Turns whiteouts into what overlayfs knows: a device 0:0, or an opaque directory where the name lives on.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        // One inode for all: overlayfs links its own whiteouts too.
        let mut device = None;
        for id in 0..self.nodes.len() as NodeId {
            let Kind::Dir(dir) = &mut self.nodes[id as usize].kind else {
                continue;
            };
            for name in std::mem::take(&mut dir.whiteouts) {
                match self.child(id, &name) {
                    Some(child) => {
                        if let Kind::Dir(dir) = &mut self.nodes[child as usize].kind {
                            dir.opaque = true;
                        }
                    }
                    None => {
                        let whiteout = match device {
                            Some(id) => id,
                            None => self.push(Node {
                                meta: Meta::default(),
                                kind: Kind::Char(0),
                            })?,
                        };
                        device = Some(whiteout);
                        self.dir_mut(id).entries.insert(name, whiteout);
                    }
                }
            }
        }
        for node in &mut self.nodes {
            if let Kind::Dir(dir) = &node.kind
                && dir.opaque
            {
                node.meta.xattrs.push(Xattr {
                    prefix: TRUSTED,
                    name: b"overlay.opaque".to_vec(),
                    value: b"y".to_vec(),
                });
            }
        }
        Ok(())
    }

    /// Follows `parts` from the root to a directory; makes missing ones if `make`.
    fn walk(&mut self, parts: &[&[u8]], make: bool) -> Result<NodeId, String> {
        let mut way = vec![ROOT];
        let mut todo: Vec<Vec<u8>> = parts.iter().rev().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            let here = way.last().copied().unwrap_or(ROOT);
            match part.as_slice() {
                b"" | b"." => continue,
                // Only out of a link's target: names with it were refused.
                b".." if way.len() > 1 => {
                    way.pop();
                    continue;
                }
                b".." => return Err("a symbolic link on its way leads out of the tree".into()),
                _ => {}
            }
            let shown = super::show(&part);
            let child = match self.child(here, &part) {
                Some(child) => child,
                None if make => {
                    if part.len() > MAX_NAME {
                        return Err(format!("a name on its way has more than {MAX_NAME} bytes"));
                    }
                    let id = self.push(implicit_dir())?;
                    self.set_child(here, part, id)?;
                    id
                }
                None => return Err(format!("{shown:?} on its way is not in this layer")),
            };
            match &self.node(child).kind {
                Kind::Dir(_) => way.push(child),
                Kind::Symlink(target, _) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err("too many symbolic links on its way".into());
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    todo.extend(target.rsplit(|&b| b == b'/').map(<[u8]>::to_vec));
                }
                _ => return Err(format!("{shown:?} on its way is no directory")),
            }
            if way.len() > MAX_DEPTH {
                return Err(format!("it lies deeper than {MAX_DEPTH} directories"));
            }
        }
        Ok(way.last().copied().unwrap_or(ROOT))
    }

    fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(dir).kind {
            Kind::Dir(dir) => dir.entries.get(name).copied(),
            _ => None,
        }
    }

    fn set_child(&mut self, dir: NodeId, name: Vec<u8>, id: NodeId) -> Result<(), String> {
        self.count_name(name.len())?;
        self.dir_mut(dir).entries.insert(name.into(), id);
        Ok(())
    }

    /// `walk` and `locate` only ever give directories; the fallback keeps a mistake there from being a panic.
    fn dir_mut(&mut self, id: NodeId) -> &mut Dir {
        let id = if matches!(self.nodes[id as usize].kind, Kind::Dir(_)) {
            id
        } else {
            ROOT
        };
        match &mut self.nodes[id as usize].kind {
            Kind::Dir(dir) => dir,
            _ => unreachable!("the root is always a directory"),
        }
    }

    fn push(&mut self, node: Node) -> Result<NodeId, String> {
        if self.nodes.len() >= MAX_ENTRIES {
            return Err(format!("the layer has more than {MAX_ENTRIES} entries"));
        }
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as NodeId)
    }

    fn count_name(&mut self, bytes: usize) -> Result<(), String> {
        self.names += 1;
        if self.names > MAX_ENTRIES {
            return Err(format!("the layer has more than {MAX_ENTRIES} names"));
        }
        self.count_bytes(bytes)
    }

    fn count_bytes(&mut self, bytes: usize) -> Result<(), String> {
        self.name_bytes += bytes;
        if self.name_bytes > MAX_NAME_BYTES {
            return Err(format!(
                "names, links and attributes of the layer take more than {MAX_NAME_BYTES} bytes"
            ));
        }
        Ok(())
    }

    fn meta(&mut self, entry: &Entry) -> Result<Meta, String> {
        let mut xattrs = Vec::new();
        let mut bytes = 0;
        for (key, value) in &entry.xattrs {
            let Some((prefix, name)) = xattr_name(key) else {
                continue;
            };
            if name.len() > MAX_NAME || value.len() > usize::from(u16::MAX) {
                return Err(format!("the attribute {:?} is too long", super::show(key)));
            }
            bytes += key.len() + value.len();
            xattrs.push(Xattr {
                prefix,
                name: name.to_vec(),
                value: value.clone(),
            });
        }
        if bytes > MAX_XATTR_BYTES {
            return Err(format!(
                "its attributes take more than {MAX_XATTR_BYTES} bytes"
            ));
        }
        self.count_bytes(bytes)?;
        Ok(Meta {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs,
        })
    }
}

/// A directory nobody described.
fn implicit_dir() -> Node {
    Node {
        meta: Meta {
            mode: 0o755,
            ..Meta::default()
        },
        kind: Kind::Dir(Box::default()),
    }
}

/// The parts of an entry's name; none for the root.
fn parts(name: &[u8]) -> Result<Vec<&[u8]>, String> {
    if name.contains(&0) {
        return Err("the name contains a NUL".into());
    }
    if name.len() > MAX_PATH {
        return Err(format!("the name has more than {MAX_PATH} bytes"));
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
    // Some builders call the root "/": that leads nowhere else.
    if name.starts_with(b"/") && !parts.is_empty() {
        return Err("the name is absolute".into());
    }
    if parts.iter().any(|p| p.len() > MAX_NAME) {
        return Err(format!("the name has a part of more than {MAX_NAME} bytes"));
    }
    Ok(parts)
}

/// EROFS's number for `trusted.`.
const TRUSTED: u8 = 4;

/// Prefix number and rest of an attribute's name; None for those a guest can't or must not get.
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
