//! An independent reader of EROFS images, written from the kernel's description without code of the writer.
//!
//! Supports extended inodes and the layouts flat, inline and chunk-based. Panics on invalid images.

use std::collections::BTreeMap;

/// A file of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// Including the type bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub links: u32,
    pub size: u64,
    /// Number of a device.
    pub device: u32,
    /// Content of a file, or target of a link.
    pub content: Vec<u8>,
    /// Values by prefix number and name.
    pub xattrs: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
    /// Inode number, the same for hard links.
    pub nid: u64,
    /// Length of its holes in bytes.
    pub holes: u64,
}

pub(crate) struct Reader<'a> {
    image: &'a [u8],
    meta: u64,
}

impl<'a> Reader<'a> {
    /// Reads the whole tree. The path of the root is empty.
    pub(crate) fn read_all(image: &'a [u8]) -> BTreeMap<Vec<u8>, Found> {
        assert_eq!(image.len() % 4096, 0, "whole blocks");
        let sb = &image[1024..1024 + 128];
        assert_eq!(u32at(sb, 0), 0xE0F5_E1E2, "magic");
        assert_eq!(sb[12], 12, "block bits");
        assert_eq!(
            u64::from(u32at(sb, 36)) * 4096,
            image.len() as u64,
            "block count"
        );
        let reader = Self {
            image,
            meta: u64::from(u32at(sb, 40)) * 4096,
        };
        let root = u64::from(u16at(sb, 14));
        let mut tree = BTreeMap::new();
        reader.visit(root, root, Vec::new(), &mut tree);
        let inodes: std::collections::BTreeSet<u64> = tree.values().map(|f| f.nid).collect();
        assert_eq!(u64at(sb, 16), inodes.len() as u64, "inode count");
        tree
    }

    fn visit(&self, nid: u64, parent: u64, path: Vec<u8>, tree: &mut BTreeMap<Vec<u8>, Found>) {
        let found = self.inode(nid);
        let is_dir = found.mode & 0o170_000 == 0o040_000;
        let content = found.content.clone();
        assert!(tree.insert(path.clone(), found).is_none(), "a name twice");
        if !is_dir {
            return;
        }
        let mut last: Option<Vec<u8>> = None;
        for block in content.chunks(4096) {
            let count = usize::from(u16at(block, 8)) / 12;
            assert!(count > 0, "an empty directory block");
            for at in 0..count {
                let start = usize::from(u16at(block, at * 12 + 8));
                let end = if at + 1 < count {
                    usize::from(u16at(block, at * 12 + 20))
                } else {
                    block.len()
                };
                let name: Vec<u8> = block[start..end]
                    .iter()
                    .copied()
                    .take_while(|b| *b != 0)
                    .collect();
                assert!(last.as_ref().is_none_or(|l| *l < name), "names in order");
                last = Some(name.clone());
                let child = u64at(block, at * 12);
                match name.as_slice() {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        let path = if path.is_empty() {
                            name
                        } else {
                            [&path[..], b"/", &name].concat()
                        };
                        self.visit(child, nid, path.clone(), tree);
                        let kinds = [
                            (2, 0o04),
                            (1, 0o10),
                            (3, 0o02),
                            (4, 0o06),
                            (5, 0o01),
                            (7, 0o12),
                        ];
                        let kind = kinds
                            .iter()
                            .find(|(k, _)| *k == block[at * 12 + 10])
                            .expect("a known type")
                            .1;
                        assert_eq!(tree[&path].mode >> 12, kind, "type of {path:?}");
                    }
                }
            }
        }
    }

    fn inode(&self, nid: u64) -> Found {
        let at = (self.meta + nid * 32) as usize;
        assert!(at % 4096 + 64 <= 4096, "an inode across a block's end");
        let raw = &self.image[at..at + 64];
        let format = u16at(raw, 0);
        assert_eq!(format & 1, 1, "extended");
        let units = usize::from(u16at(raw, 2));
        let xattr_bytes = if units == 0 { 0 } else { 12 + 4 * (units - 1) };
        let mode = u16at(raw, 4);
        let size = u64at(raw, 8);
        let special = !matches!(mode & 0o170_000, 0o100_000 | 0o040_000 | 0o120_000);
        let mut holes = 0;
        let content = if special {
            Vec::new()
        } else {
            self.content(
                format >> 1,
                size,
                u32at(raw, 16),
                at + 64 + xattr_bytes,
                &mut holes,
            )
        };
        Found {
            mode,
            uid: u32at(raw, 24),
            gid: u32at(raw, 28),
            mtime: (u64at(raw, 32) as i64, u32at(raw, 40)),
            links: u32at(raw, 44),
            size,
            device: if special { u32at(raw, 16) } else { 0 },
            content,
            xattrs: self.xattrs(&self.image[at + 64..at + 64 + xattr_bytes]),
            nid,
            holes,
        }
    }

    fn content(
        &self,
        layout: u16,
        size: u64,
        union: u32,
        behind: usize,
        holes: &mut u64,
    ) -> Vec<u8> {
        let size = usize::try_from(size).unwrap();
        let start = union as usize * 4096;
        match layout {
            0 => self.image[if size == 0 { 0..0 } else { start..start + size }].to_vec(),
            2 => {
                let (whole, tail) = (size / 4096 * 4096, size % 4096);
                assert!(
                    tail > 0 && behind % 4096 + tail <= 4096,
                    "a tail across a block's end"
                );
                let whole: &[u8] = if whole == 0 {
                    &[]
                } else {
                    &self.image[start..start + whole]
                };
                [whole, &self.image[behind..behind + tail]].concat()
            }
            4 => {
                let chunk = 4096usize << (union & 0x1f);
                assert_eq!(union & !0x1f, 0, "a map of addresses");
                let mut content = Vec::with_capacity(size);
                for at in 0..size.div_ceil(chunk) {
                    let block = u32at(self.image, behind + at * 4);
                    let length = chunk.min(size - at * chunk);
                    if block == u32::MAX {
                        *holes += length as u64;
                        content.resize(content.len() + length, 0);
                    } else {
                        content.extend(&self.image[block as usize * 4096..][..length]);
                    }
                }
                content
            }
            other => panic!("layout {other}"),
        }
    }

    fn xattrs(&self, area: &[u8]) -> BTreeMap<(u8, Vec<u8>), Vec<u8>> {
        let mut xattrs = BTreeMap::new();
        let mut rest = if area.is_empty() { area } else { &area[12..] };
        while !rest.is_empty() {
            let (name, value) = (usize::from(rest[0]), usize::from(u16at(rest, 2)));
            let key = (rest[1], rest[4..4 + name].to_vec());
            xattrs.insert(key, rest[4 + name..4 + name + value].to_vec());
            rest = &rest[(4 + name + value).next_multiple_of(4)..];
        }
        xattrs
    }
}

fn u16at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
