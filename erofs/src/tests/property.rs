//! Random trees, converted and read back with the test's reader and fsck.erofs; and random damage.

use std::collections::BTreeMap;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;

/// A random entry.
#[derive(Debug, Clone)]
enum Item {
    /// Size, first byte, and position and length of a run of zeros.
    File {
        size: usize,
        seed: u8,
        zeros: (usize, usize),
    },
    Symlink(String),
    Dir,
    Fifo,
    Device(bool, u16, u32),
    /// Hard link to one of the files before it, by index.
    Hard(usize),
}

#[derive(Debug, Clone)]
struct Model {
    item: Item,
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<String, Vec<u8>>,
}

fn item() -> impl Strategy<Value = Item> {
    // Sizes near the limits of each layout.
    let size = prop_oneof![
        0usize..20,
        2040usize..2060,
        4090usize..4100,
        6100usize..6200,
        65_530usize..65_540,
        100_000usize..300_000,
    ];
    prop_oneof![
        6 => (size, any::<u8>(), (0usize..300_000, 0usize..200_000))
            .prop_map(|(size, seed, zeros)| Item::File { size, seed, zeros }),
        2 => "[a-z/.]{1,90}".prop_map(Item::Symlink),
        2 => Just(Item::Dir),
        1 => Just(Item::Fifo),
        1 => (any::<bool>(), 0u16..4096, 0u32..1 << 20).prop_map(|(block, major, minor)| Item::Device(block, major, minor)),
        1 => (0usize..100).prop_map(Item::Hard),
    ]
}

fn model() -> impl Strategy<Value = Model> {
    let xattrs = btree_map(
        "(user|security)\\.[a-z.]{1,40}",
        vec(any::<u8>(), 0..1500),
        0..4,
    );
    (
        item(),
        0u16..0o10000,
        any::<u32>(),
        any::<u32>(),
        (-1i64 << 40..1 << 40, 0u32..1_000_000_000),
        xattrs,
    )
        .prop_map(|(item, mode, uid, gid, mtime, xattrs)| Model {
            item,
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        })
}

/// Paths whose parents are all `d…`, so that no file is used as a directory.
fn trees() -> impl Strategy<Value = BTreeMap<String, Model>> {
    let path = "(d[ab]/){0,4}[f-hx-z]{1,3}[ !-.0-~\u{e4}\u{20ac}]{0,40}";
    btree_map(
        path.prop_filter("a whiteout is not an ordinary name", |p| {
            !p.contains(".wh.")
        }),
        model(),
        0..40,
    )
}

fn content(size: usize, seed: u8, zeros: (usize, usize)) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..size)
        .map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed) | 1)
        .collect();
    let start = zeros.0.min(size);
    bytes[start..(start + zeros.1).min(size)].fill(0);
    bytes
}

fn number(pair: (i64, u32)) -> String {
    let (seconds, nanos) = pair;
    match (seconds, nanos) {
        (s, n) if s >= 0 || n == 0 => format!("{s}.{n:09}"),
        // -1.25 is a quarter of a second before -1.
        (s, n) => format!("-{}.{:09}", -(s + 1), 1_000_000_000 - n),
    }
}

/// Returns the archive of a tree and the expected files of its image by path.
fn archive(tree: &BTreeMap<String, Model>) -> (Vec<u8>, BTreeMap<String, Expected>) {
    let mut tar = Archive::new();
    let mut files: Vec<String> = Vec::new();
    let mut expected: BTreeMap<String, Expected> = BTreeMap::new();
    for (path, model) in tree {
        let mut records: Vec<(String, Vec<u8>)> = vec![
            ("path".into(), path.clone().into_bytes()),
            ("uid".into(), model.uid.to_string().into_bytes()),
            ("gid".into(), model.gid.to_string().into_bytes()),
            ("mtime".into(), number(model.mtime).into_bytes()),
        ];
        records.extend(
            model
                .xattrs
                .iter()
                .map(|(k, v)| (format!("SCHILY.xattr.{k}"), v.clone())),
        );
        let (kind, body, device, link) = match &model.item {
            Item::File { size, seed, zeros } => ('0', content(*size, *seed, *zeros), None, None),
            Item::Symlink(target) => ('2', Vec::new(), None, Some(target.clone())),
            Item::Dir => ('5', Vec::new(), None, None),
            Item::Fifo => ('6', Vec::new(), None, None),
            Item::Device(block, major, minor) => (
                if *block { '4' } else { '3' },
                Vec::new(),
                Some((u32::from(*major), *minor)),
                None,
            ),
            Item::Hard(_) if files.is_empty() => ('0', Vec::new(), None, None),
            Item::Hard(n) => ('1', Vec::new(), None, Some(files[n % files.len()].clone())),
        };
        if let Some(link) = &link {
            records.push(("linkpath".into(), link.clone().into_bytes()));
        }
        let records: Vec<(&str, &[u8])> = records
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_slice()))
            .collect();
        tar.pax(&records);
        let set = |h: &mut ::tar::Header| {
            h.set_mode(u32::from(model.mode));
            if let Some((major, minor)) = device {
                h.set_device_major(major).unwrap();
                h.set_device_minor(minor).unwrap();
            }
        };
        tar.entry("short", kind, set, &body);
        let bits = match kind {
            '0' => 0o100_000,
            '2' => 0o120_000,
            '5' => 0o040_000,
            '6' => 0o010_000,
            '4' => 0o060_000,
            _ => 0o020_000,
        };
        if kind == '0' {
            files.push(path.clone());
        }
        let expected_item = if kind == '1' {
            expected[&link.unwrap_or_default()].clone()
        } else {
            Expected {
                mode: bits | model.mode,
                owner: (model.uid, model.gid),
                mtime: model.mtime,
                content: link.map_or(body, String::into_bytes),
                device: device.map_or(0, |(major, minor)| {
                    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
                }),
                xattrs: model.xattrs.clone(),
                same_as: path.clone(),
            }
        };
        expected.insert(path.clone(), expected_item);
    }
    (tar.finish(), expected)
}

#[derive(Debug, Clone, PartialEq)]
struct Expected {
    mode: u16,
    owner: (u32, u32),
    mtime: (i64, u32),
    content: Vec<u8>,
    device: u32,
    xattrs: BTreeMap<String, Vec<u8>>,
    /// The first name of its inode.
    same_as: String,
}

fn check(expected: &BTreeMap<String, Expected>, found: &BTreeMap<Vec<u8>, Found>) {
    for (path, want) in expected {
        let got = found
            .get(path.as_bytes())
            .unwrap_or_else(|| panic!("{path} is missing"));
        let is_dir = want.mode & 0o170_000 == 0o040_000;
        assert_eq!(
            (got.mode, (got.uid, got.gid), got.mtime),
            (want.mode, want.owner, want.mtime),
            "{path}"
        );
        assert!(is_dir || got.content == want.content, "content of {path}");
        assert_eq!(got.device, want.device, "{path}");
        let xattrs: BTreeMap<(u8, Vec<u8>), Vec<u8>> = want
            .xattrs
            .iter()
            .map(|(key, value)| {
                let (space, name) = key.split_once('.').unwrap();
                (
                    (
                        if space == "user" { 1 } else { 6 },
                        name.as_bytes().to_vec(),
                    ),
                    value.clone(),
                )
            })
            .collect();
        assert_eq!(got.xattrs, xattrs, "{path}");
        assert_eq!(got.nid, found[want.same_as.as_bytes()].nid, "{path}");
        let names = expected
            .values()
            .filter(|e| e.same_as == want.same_as)
            .count();
        assert!(is_dir || got.links as usize == names, "links of {path}");
    }
    // Everything else is a directory without an entry.
    for (path, got) in found {
        let text = String::from_utf8(path.clone()).unwrap();
        let inner = expected.keys().any(|k| k.starts_with(&format!("{text}/"))) || path.is_empty();
        assert!(
            expected.contains_key(&text) || (inner && got.mode == 0o040_755),
            "{text} appeared"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn converted_tree_equals_its_model(tree in trees()) {
        let (tar, expected) = archive(&tree);
        let file = convert(&tar).unwrap();
        fsck(file.path());
        check(&expected, &Reader::read_all(&std::fs::read(file.path()).unwrap()));
    }

    /// Damage leads to an error or to an image that fsck.erofs accepts.
    #[test]
    fn damaged_archive_never_panics(tree in trees(), at in any::<prop::sample::Index>(), byte in any::<u8>(), fix in any::<bool>()) {
        let (mut tar, _) = archive(&tree);
        let at = at.index(tar.len());
        tar[at] = byte;
        if fix {
            // Corrects the sum of the damaged header, so that the damage gets past it.
            let start = at / 512 * 512;
            let mut header = ::tar::Header::from_byte_slice(&tar[start..start + 512]).clone();
            header.set_cksum();
            tar[start..start + 512].copy_from_slice(header.as_bytes());
        }
        if let Ok(file) = convert(&tar) {
            fsck(file.path());
        }
    }
}
