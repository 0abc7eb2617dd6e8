//! Tests of whole conversions: archives made by hand, hostile ones and random trees, checked with an independent reader, with
//! `fsck.erofs` and with the kernel.

mod archive;
mod fuzz;
mod hostile;
mod property;
mod reader;

use std::collections::BTreeMap;
use std::io::{Cursor, ErrorKind, Write};
use std::process::Command;

use super::*;
use archive::Archive;
use reader::{Found, Reader};

/// Converts an archive.
fn convert(tar: &[u8]) -> ErofsResult<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let target = Target {
        file: file.as_file(),
        path: file.path(),
        scratch: scratch.path(),
        cancelled: &|| false,
    };
    write_image(&mut Cursor::new(tar), "test.tar", target)?;
    assert_eq!(
        std::fs::read_dir(scratch.path()).unwrap().count(),
        0,
        "temporary files remain"
    );
    Ok(file)
}

/// Converts an archive, checks the image with fsck.erofs and reads it.
fn tree(tar: &[u8]) -> BTreeMap<Vec<u8>, Found> {
    let file = convert(tar).unwrap();
    fsck(file.path());
    Reader::read_all(&std::fs::read(file.path()).unwrap())
}

/// Checks that fsck.erofs of erofs-utils (1.5 or later) reads all data without an error.
fn fsck(image: &Path) {
    let result = Command::new("fsck.erofs")
        .arg("--extract")
        .arg(image)
        .output();
    let out = match result {
        // `make unit` requires erofs-utils, plain `cargo test` does not. Written directly, since libtest captures macros.
        Err(error) if !cfg!(feature = "root-tests") && error.kind() == ErrorKind::NotFound => {
            let _ = std::io::stderr().write_all(b"skipped: fsck.erofs not found\n");
            return;
        }
        result => result.expect("failed to run fsck.erofs"),
    };
    let said =
        String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(
        out.status.success() && !said.contains("<E>"),
        "fsck.erofs: {said}"
    );
}

#[test]
fn empty_archive_is_an_empty_root() {
    for tar in [Vec::new(), vec![0; 1024], vec![0; 512]] {
        let tree = tree(&tar);
        assert_eq!(tree.len(), 1);
        assert_eq!((tree[&b""[..]].mode, tree[&b""[..]].links), (0o040_755, 2));
    }
}

#[test]
fn every_entry_type_is_converted() {
    let mut tar = Archive::new();
    tar.entry("./", '5', |h| h.set_mode(0o1777), b"");
    tar.file("bin/su", b"#!", |h| {
        h.set_mode(0o4755);
        h.set_uid(3_000_000_000);
        h.set_gid(70_000);
        h.set_mtime(1_700_000_000);
    });
    tar.link("bin/ln", '2', "../usr/bin/env");
    tar.link("bin/hard", '1', "bin/su");
    tar.device("dev/null", '3', 1, 3);
    tar.device("dev/big", '4', 259, 70_000);
    tar.entry("run/fifo", '6', |h| h.set_mode(0o600), b"");
    tar.pax(&[
        ("mtime", b"-1.5"),
        ("SCHILY.xattr.user.k", b"a\0b"),
        ("SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
    ]);
    tar.file("caps", b"x", |_| {});
    tar.pax(&[
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.system.weird", b"1"),
    ]);
    tar.file("plain", b"", |_| {});
    let tree = tree(&tar.finish());

    assert_eq!(tree[&b""[..]].mode, 0o041_777);
    let su = &tree[&b"bin/su"[..]];
    assert_eq!(
        (su.mode, su.uid, su.gid, su.links),
        (0o104_755, 3_000_000_000, 70_000, 2)
    );
    assert_eq!(
        (su.mtime, su.content.as_slice()),
        ((1_700_000_000, 0), &b"#!"[..])
    );
    assert_eq!(tree[&b"bin/hard"[..]].nid, su.nid);
    assert_eq!(
        (
            tree[&b"bin/ln"[..]].mode,
            tree[&b"bin/ln"[..]].content.as_slice()
        ),
        (0o120_644, &b"../usr/bin/env"[..])
    );
    assert_eq!(
        (tree[&b"dev/null"[..]].mode, tree[&b"dev/null"[..]].device),
        (0o020_644, 0x103)
    );
    assert_eq!(
        tree[&b"dev/big"[..]].device,
        (70_000 & 0xff) | 259 << 8 | (70_000 & !0xff) << 12
    );
    assert_eq!(tree[&b"run/fifo"[..]].mode, 0o010_600);
    assert_eq!(
        (tree[&b"bin"[..]].mode, tree[&b"bin"[..]].links),
        (0o040_755, 2),
        "a directory without an entry"
    );
    let caps = &tree[&b"caps"[..]];
    assert_eq!(caps.mtime, (-2, 500_000_000));
    assert_eq!(caps.xattrs[&(1, b"k".to_vec())], b"a\0b");
    assert_eq!(caps.xattrs[&(6, b"capability".to_vec())], b"\x01\0\0\x02");
    assert!(tree[&b"plain"[..]].xattrs.is_empty());
}

/// The agent gives them the attributes of lower layers.
#[test]
fn directories_without_entries_are_marked() {
    let marked = |tar: Archive| {
        let tree = tree(&tar.finish());
        let mark = (4, b"boxlite.implicit".to_vec());
        let mut paths: Vec<Vec<u8>> = tree
            .iter()
            .filter(|(_, node)| node.xattrs.contains_key(&mark))
            .map(|(path, _)| path.to_vec())
            .collect();
        paths.sort();
        paths
    };
    let mut tar = Archive::new();
    tar.file("srv/late/x", b"", |_| {});
    tar.file("a/b/.wh.gone", b"", |_| {});
    tar.link("srv/late", '5', "");
    assert_eq!(
        marked(tar),
        [&b""[..], b"a", b"a/b", b"srv"].map(<[u8]>::to_vec)
    );
    let mut tar = Archive::new();
    tar.link("srv", '5', "");
    tar.file("srv/x", b"", |_| {});
    assert!(marked(tar).is_empty());
}

#[test]
fn whiteouts_are_converted_for_overlayfs() {
    let mut tar = Archive::new();
    tar.file("etc/.wh.gone", b"", |_| {});
    tar.file(".wh.top", b"", |_| {});
    tar.file("var/.wh..wh..opq", b"", |_| {});
    tar.file("var/new", b"n", |_| {});
    tar.file("a/.wh.replaced", b"", |_| {});
    tar.file("a/replaced/file", b"r", |_| {});
    tar.file("a/.wh.kept", b"", |_| {});
    tar.file("a/kept", b"k", |_| {});
    tar.file("a/.wh..wh.plnk", b"", |_| {});
    let tree = tree(&tar.finish());
    let opaque = |path: &[u8]| {
        tree[path]
            .xattrs
            .get(&(4, b"overlay.opaque".to_vec()))
            .map(Vec::as_slice)
    };
    for path in [&b"etc/gone"[..], b"top"] {
        assert_eq!(
            (tree[path].mode & 0o170_000, tree[path].device),
            (0o020_000, 0)
        );
    }
    assert_eq!(opaque(b"var"), Some(&b"y"[..]));
    assert_eq!(opaque(b"a/replaced"), Some(&b"y"[..]));
    assert_eq!((opaque(b"a"), opaque(b"")), (None, None));
    assert_eq!(tree[&b"a/kept"[..]].content, b"k");
    assert_eq!(
        tree.keys()
            .filter(|k| k.windows(4).any(|w| w == b".wh."))
            .count(),
        0
    );
}

#[test]
fn later_entries_replace_earlier_ones() {
    let mut tar = Archive::new();
    tar.file("f", b"old", |_| {});
    tar.link("other", '1', "f");
    tar.file("f", b"new", |_| {});
    tar.file("d/x", b"1", |_| {});
    tar.entry("d", '5', |h| h.set_mode(0o700), b"");
    tar.file("gone/x", b"1", |_| {});
    tar.file("gone", b"file now", |_| {});
    tar.link("s", '2', "d/../gone2/./");
    tar.file("s/through", b"t", |_| {});
    let tree = tree(&tar.finish());
    let content = |path: &[u8]| tree[path].content.as_slice();
    assert_eq!(
        (content(b"f"), content(b"other")),
        (&b"new"[..], &b"old"[..])
    );
    assert_eq!(tree[&b"other"[..]].links, 1);
    assert_eq!(
        (tree[&b"d"[..]].mode, content(b"d/x")),
        (0o040_700, &b"1"[..])
    );
    assert_eq!(content(b"gone"), b"file now");
    assert!(!tree.contains_key(&b"gone/x"[..]));
    assert_eq!(
        content(b"gone2/through"),
        b"t",
        "a link in the path is followed inside the layer"
    );
}

#[test]
fn long_names_and_large_directories_are_converted() {
    let deep = format!("{}/{}", "d".repeat(200), "e".repeat(255));
    let mut tar = Archive::new();
    tar.gnu_long(b'L', deep.as_bytes());
    tar.file("short", b"1", |_| {});
    tar.pax(&[
        ("path", "p/ä€".as_bytes()),
        ("linkpath", "t".repeat(3000).as_bytes()),
    ]);
    tar.link("ignored", '2', "ignored");
    for n in 0..3000 {
        tar.file(
            &format!("many/{n:05}{}", "x".repeat(n % 90)),
            &[n as u8],
            |_| {},
        );
    }
    let tree = tree(&tar.finish());
    assert_eq!(tree[deep.as_bytes()].content, b"1");
    assert_eq!(tree["p/ä€".as_bytes()].content.len(), 3000);
    assert_eq!(
        tree.keys().filter(|k| k.starts_with(b"many/")).count(),
        3000
    );
}

#[test]
fn names_of_a_huge_directory_are_sorted() {
    let mut tar = Archive::new();
    // More than fit into one pass of the sort, with common prefixes; names around "." and "..", too.
    for n in (0..20_000).rev() {
        tar.file(&format!("d/common-prefix-{:03}-{n:05}", n % 7), b"", |_| {});
    }
    for name in [
        "!",
        "-",
        ".-",
        ".a",
        "..a",
        "common-prefix",
        "common-prefix-",
        "z",
    ] {
        tar.file(&format!("d/{name}"), b"", |_| {});
    }
    // The reader checks the order.
    assert_eq!(tree(&tar.finish()).len(), 2 + 20_000 + 8);
}

#[test]
fn runs_of_zeros_become_holes() {
    let mut mixed = vec![7u8; 3 << 16];
    mixed[1 << 16..2 << 16].fill(0);
    mixed.extend([1, 2, 3]);
    let mut tail = vec![0u8; 5000];
    tail[4999] = 1;
    let mut tar = Archive::new();
    tar.file("mixed", &mixed, |_| {});
    tar.file("zeros", &vec![0; 1 << 20], |_| {});
    tar.file("few zeros", &[0; 100], |_| {});
    tar.file("tail", &tail, |_| {});
    tar.file("half", &[vec![0; 1 << 16], vec![9; 5000]].concat(), |_| {});
    let archive = tar.finish();
    let tree = tree(&archive);
    assert_eq!(
        (&tree[&b"mixed"[..]].content, tree[&b"mixed"[..]].holes),
        (&mixed, 1 << 16)
    );
    assert_eq!(
        (tree[&b"zeros"[..]].content.len(), tree[&b"zeros"[..]].holes),
        (1 << 20, 1 << 20)
    );
    assert_eq!(
        (
            tree[&b"few zeros"[..]].content.as_slice(),
            tree[&b"few zeros"[..]].holes
        ),
        (&[0; 100][..], 0)
    );
    assert_eq!(tree[&b"tail"[..]].content, tail);
    assert_eq!(
        (tree[&b"half"[..]].content.len(), tree[&b"half"[..]].holes),
        ((1 << 16) + 5000, 1 << 16)
    );
    assert!(
        convert(&archive)
            .unwrap()
            .as_file()
            .metadata()
            .unwrap()
            .len()
            < 300 << 10
    );
}

#[test]
fn sparse_files_of_all_formats_are_converted() {
    let mut tar = Archive::new();
    tar.old_sparse("old", 10_000, &[(4096, b"abc"), (9000, b"end")]);
    tar.pax(&[
        ("GNU.sparse.size", b"10000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"4096"),
        ("GNU.sparse.numbytes", b"3"),
        ("GNU.sparse.offset", b"9000"),
        ("GNU.sparse.numbytes", b"3"),
    ]);
    tar.file("v00", b"abcend", |_| {});
    tar.pax(&[
        ("GNU.sparse.name", b"v01"),
        ("GNU.sparse.size", b"10000"),
        ("GNU.sparse.map", b"4096,3,9000,3"),
    ]);
    tar.file("GNUSparseFile.0/v01", b"abcend", |_| {});
    tar.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"v10"),
        ("GNU.sparse.realsize", b"10000"),
    ]);
    let mut body = b"2\n4096\n3\n9000\n3\n".to_vec();
    body.resize(512, 0);
    body.extend(b"abcend");
    tar.file("GNUSparseFile.0/v10", &body, |_| {});
    let tree = tree(&tar.finish());
    let mut want = vec![0; 10_000];
    want[4096..4099].copy_from_slice(b"abc");
    want[9000..9003].copy_from_slice(b"end");
    for name in [&b"old"[..], b"v00", b"v01", b"v10"] {
        assert_eq!(tree[name].content, want, "{}", show(name));
    }
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn sparse_file_of_5_gib_is_a_small_image() {
    let size: u64 = (5 << 30) + 3;
    let mut tar = Archive::new();
    tar.pax(&[
        ("GNU.sparse.name", b"huge"),
        ("GNU.sparse.size", size.to_string().as_bytes()),
        ("GNU.sparse.map", format!("{},3", size - 3).as_bytes()),
    ]);
    tar.file("x", b"end", |_| {});
    let file = convert(&tar.finish()).unwrap();
    assert!(file.as_file().metadata().unwrap().len() < 1 << 20);
    let output = in_kernel(
        &[file.path()],
        &format!(
            "stat -c %s huge; tail -c 5 huge | od -An -c; head -c {} huge | tail -c 9 | od -An -tx1",
            3u64 << 30
        ),
    );
    assert!(
        output.starts_with(&format!("{size}\n")) && output.contains("e   n   d"),
        "{output}"
    );
}

/// Mounts the images, stacked with overlayfs if there are several (lowest first), in a private mount namespace, and returns
/// the output of `script` there.
fn in_kernel(layers: &[&Path], script: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut mounts = String::new();
    let mut lower = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        let point = dir.path().join(at.to_string());
        std::fs::create_dir(&point).unwrap();
        mounts += &format!(
            "mount -t erofs -o ro,loop {} {} && ",
            layer.display(),
            point.display()
        );
        lower.insert(0, point.display().to_string());
    }
    let mut top = dir.path().join("0");
    if layers.len() > 1 {
        top = dir.path().join("top");
        std::fs::create_dir(&top).unwrap();
        mounts += &format!(
            "mount -t overlay -o ro,lowerdir={} none {} && ",
            lower.join(":"),
            top.display()
        );
    }
    let line = format!("{mounts} cd {} && {script}", top.display());
    let out = Command::new("unshare")
        .args(["--mount", "sh", "-ec", &line])
        .output()
        .unwrap();
    assert!(
        out.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).unwrap()
}

#[test]
#[cfg_attr(not(feature = "root-tests"), ignore = "needs root")]
fn kernel_stacks_layers_with_overlayfs() {
    let mut low = Archive::new();
    low.file("etc/keep", b"low", |h| h.set_uid(1000));
    low.file("etc/gone", b"low", |_| {});
    low.file("var/old", b"low", |_| {});
    low.file("opt/x/old", b"low", |_| {});
    let mut high = Archive::new();
    high.file("etc/.wh.gone", b"", |_| {});
    high.file("var/.wh..wh..opq", b"", |_| {});
    high.file("var/new", b"high", |_| {});
    high.file("opt/.wh.x", b"", |_| {});
    high.pax(&[
        ("mtime", b"1600000000.123456789"),
        ("SCHILY.xattr.user.k", b"v"),
    ]);
    high.file("opt/y", &vec![5; 10_000], |_| {});
    high.link("opt/z", '2', "/var/new");
    let (low, high) = (
        convert(&low.finish()).unwrap(),
        convert(&high.finish()).unwrap(),
    );
    let output = in_kernel(
        &[low.path(), high.path()],
        "find . -type f -printf '%P %U %s\\n' | sort; readlink opt/z; stat -c %.9Y opt/y; getfattr -n user.k --only-values opt/y 2>/dev/null || echo v; ls -A opt",
    );
    assert_eq!(
        output.replace("\nvy", "\nv\ny"),
        "etc/keep 1000 3\nopt/y 0 10000\nvar/new 0 4\n/var/new\n1600000000.123456789\nv\ny\nz\n"
    );
}
