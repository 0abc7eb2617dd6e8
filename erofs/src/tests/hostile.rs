//! Archives that must be rejected, each with an error that names the entry or the damage.

use super::*;

/// Converts the archive built by `make`, which must be rejected.
fn rejected(make: impl FnOnce(&mut Archive)) -> ErofsError {
    let mut archive = Archive::new();
    make(&mut archive);
    match convert(&archive.finish()) {
        Err(error) => error,
        Ok(_) => panic!("the archive was accepted"),
    }
}

/// The rejected entry, a part of the reason, and the archive.
type Case = (&'static str, &'static str, fn(&mut Archive));

const OUT_OF_THE_TREE: &[Case] = &[
    ("../evil", "..", |a| a.file("../evil", b"", |_| {})),
    ("a/../../evil", "..", |a| {
        a.file("a/../../evil", b"", |_| {})
    }),
    ("a/..", "..", |a| a.entry("a/..", '5', |_| {}, b"")),
    ("/etc/passwd", "absolute", |a| {
        a.file("/etc/passwd", b"", |_| {})
    }),
    ("h", "..", |a| a.link("h", '1', "../../etc/shadow")),
    ("h", "absolute", |a| a.link("h", '1', "/etc/shadow")),
    ("s/passwd", "out of the tree", |a| {
        a.link("s", '2', "../../etc");
        a.file("s/passwd", b"", |_| {});
    }),
];

const NOT_IN_A_TREE: &[Case] = &[
    ("h", "not in this layer", |a| a.link("h", '1', "lower/file")),
    ("h", "is a directory", |a| {
        a.entry("d", '5', |_| {}, b"");
        a.link("h", '1', "d");
    }),
    ("l/x", "too many symbolic links", |a| {
        a.link("l", '2', "l");
        a.file("l/x", b"", |_| {});
    }),
    ("f/x", "not a directory", |a| {
        a.file("f", b"", |_| {});
        a.file("f/x", b"", |_| {});
    }),
    ("n\0x", "NUL", |a| {
        a.pax(&[("path", b"n\0x")]);
        a.file("n", b"", |_| {});
    }),
    ("t", "NUL", |a| {
        a.pax(&[("linkpath", b"a\0b")]);
        a.link("t", '2', "a");
    }),
    ("t", "no target", |a| a.link("t", '2', "")),
    (".wh.", "whiteout of nothing", |a| {
        a.file(".wh.", b"", |_| {})
    }),
    (".wh...", "whiteout of nothing", |a| {
        a.file(".wh...", b"", |_| {})
    }),
    ("./", "only a directory", |a| a.link("./", '2', "x")),
    ("z", "unknown type", |a| a.entry("z", 'Z', |_| {}, b"")),
    ("dev", "out of range", |a| a.device("dev", '3', 5000, 1)),
];

#[test]
fn entries_outside_of_the_tree_are_rejected() {
    for (name, reason, make) in OUT_OF_THE_TREE.iter().chain(NOT_IN_A_TREE) {
        let error = rejected(make);
        let ErofsError::Entry {
            entry,
            reason: said,
        } = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!(entry, name);
        assert!(said.contains(reason), "{name}: {said}");
    }
}

#[test]
fn unused_link_above_the_root_is_accepted() {
    let mut tar = Archive::new();
    tar.link("s", '2', "../../../etc/passwd");
    tar.entry("/", '5', |_| {}, b"");
    assert_eq!(
        tree(&tar.finish())[&b"s"[..]].content,
        b"../../../etc/passwd"
    );
}

#[test]
fn truncated_and_damaged_streams_are_corrupt() {
    let mut archive = Archive::new();
    archive.file("f", &[1; 3000], |_| {});
    let whole = archive.cut();
    for length in [1, 511, 513, 2000, 3511] {
        let error = convert(&whole[..length]).expect_err("a cut stream");
        assert!(
            matches!(error, ErofsError::Corrupt { .. }),
            "{length}: {error}"
        );
    }
    convert(&whole).unwrap();
    let mut damaged = whole.clone();
    damaged[0] ^= 1;
    assert!(
        convert(&damaged)
            .unwrap_err()
            .to_string()
            .contains("wrong sum")
    );
    let mut archive = Archive::new();
    archive.pax(&[("path", b"x")]);
    assert!(matches!(
        convert(&archive.finish()),
        Err(ErofsError::Corrupt { .. })
    ));
}

#[test]
fn excessive_sizes_are_rejected() {
    let long = rejected(|a| a.gnu_long(b'L', &vec![b'x'; 2 << 20]));
    assert!(matches!(long, ErofsError::TooLarge { .. }), "{long}");
    let huge = rejected(|a| {
        let size = (2u64 << 40).to_string();
        a.pax(&[
            ("GNU.sparse.name", b"huge"),
            ("GNU.sparse.size", size.as_bytes()),
            ("GNU.sparse.map", b"0,1"),
        ]);
        a.file("x", b"1", |_| {});
    });
    assert!(
        matches!(huge, ErofsError::TooLarge { .. }) && huge.to_string().contains("huge"),
        "{huge}"
    );
    for (name, reason) in [
        ("n".repeat(256), "255 bytes"),
        ("d/".repeat(1100), "deeper"),
        ("x".repeat(5000), "4096 bytes"),
    ] {
        let error = rejected(|a| {
            a.pax(&[("path", format!("{name}f").as_bytes())]);
            a.file("f", b"", |_| {});
        });
        assert!(error.to_string().contains(reason), "{error}");
    }
    let xattr = rejected(|a| {
        a.pax(&[
            ("SCHILY.xattr.user.a", &[0; 40_000]),
            ("SCHILY.xattr.user.b", &[0; 40_000]),
        ]);
        a.file("f", b"", |_| {});
    });
    assert!(xattr.to_string().contains("attributes"), "{xattr}");
}

#[test]
fn inconsistent_sparse_maps_are_rejected() {
    for map in [
        "0,5,4,2",
        "9999999,1",
        "0,1",
        "0",
        "x,1",
        "18446744073709551615,6",
    ] {
        let error = rejected(|a| {
            a.pax(&[
                ("GNU.sparse.size", b"100"),
                ("GNU.sparse.map", map.as_bytes()),
            ]);
            a.file("f", b"abcdef", |_| {});
        });
        assert!(matches!(error, ErofsError::Entry { .. }), "{map}: {error}");
    }
}

#[test]
fn global_pax_headers_beyond_the_limit_are_rejected() {
    let error = rejected(|a| {
        for index in 0..30 {
            let key = format!("SCHILY.xattr.user.{index}");
            a.global_pax(&[(&key, &[b'x'; 40_000])]);
        }
        a.file("f", b"", |_| {});
    });
    assert!(error.to_string().contains("global PAX"), "{error}");
    // Unknown records are not kept, however many.
    let mut archive = Archive::new();
    for index in 0..30 {
        archive.global_pax(&[(&format!("comment.{index}"), &[b'x'; 40_000])]);
    }
    archive.file("f", b"", |_| {});
    convert(&archive.finish()).unwrap();
}

#[test]
fn paths_with_too_many_components_are_rejected() {
    let error = rejected(|a| {
        let deep = "d/".repeat(1000);
        a.pax(&[("path", deep.as_bytes())]);
        a.entry("d", '5', |_| {}, b"");
        for link in ["s", "t"] {
            a.pax(&[("linkpath", deep.as_bytes())]);
            a.link(link, '2', "d");
        }
        for index in 0..600 {
            a.file(&format!("s/{index}"), b"", |_| {});
            a.file(&format!("t/{index}"), b"", |_| {});
        }
    });
    assert!(error.to_string().contains("components"), "{error}");
}

#[test]
fn write_image_cancelled_returns_cancelled() {
    let mut archive = Archive::new();
    (0..100).for_each(|index| archive.file(&format!("f{index}"), b"content", |_| {}));
    let archive = archive.finish();
    let (file, scratch) = (
        tempfile::NamedTempFile::new().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    for polls in [0, 1, 50, 200, 202] {
        let left = std::cell::Cell::new(polls);
        let cancelled = || left.replace(left.get() - 1) == 0;
        let target = Target {
            file: file.as_file(),
            path: file.path(),
            scratch: scratch.path(),
            cancelled: &cancelled,
        };
        let result = write_image(&mut Cursor::new(&archive), "test.tar", target);
        assert!(
            matches!(result, Err(ErofsError::Cancelled)),
            "{polls}: {result:?}"
        );
    }
}
