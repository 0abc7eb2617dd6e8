//! Archives that must be refused, each with an error that names the entry or says what is damaged.

use super::*;

/// Converts what `make` builds; it must be refused.
fn refused(make: impl FnOnce(&mut Archive)) -> ErofsError {
    let mut archive = Archive::new();
    make(&mut archive);
    match convert(&archive.finish()) {
        Err(error) => error,
        Ok(_) => panic!("the archive was taken"),
    }
}

/// The entry that is refused, a part of the reason, the archive.
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
    ("f/x", "no directory", |a| {
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
fn entries_out_of_the_tree_or_not_of_one() {
    for (name, reason, make) in OUT_OF_THE_TREE.iter().chain(NOT_IN_A_TREE) {
        let error = refused(make);
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
fn a_link_above_the_root_is_fine_while_nothing_goes_through_it() {
    let mut tar = Archive::new();
    tar.link("s", '2', "../../../etc/passwd");
    tar.entry("/", '5', |_| {}, b"");
    assert_eq!(
        tree(&tar.finish())[&b"s"[..]].content,
        b"../../../etc/passwd"
    );
}

#[test]
fn cut_and_damaged_streams() {
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
fn what_is_too_large() {
    let long = refused(|a| a.gnu_long(b'L', &vec![b'x'; 2 << 20]));
    assert!(matches!(long, ErofsError::TooLarge { .. }), "{long}");
    let huge = refused(|a| {
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
        let error = refused(|a| {
            a.pax(&[("path", format!("{name}f").as_bytes())]);
            a.file("f", b"", |_| {});
        });
        assert!(error.to_string().contains(reason), "{error}");
    }
    let xattr = refused(|a| {
        a.pax(&[
            ("SCHILY.xattr.user.a", &[0; 40_000]),
            ("SCHILY.xattr.user.b", &[0; 40_000]),
        ]);
        a.file("f", b"", |_| {});
    });
    assert!(xattr.to_string().contains("attributes"), "{xattr}");
}

#[test]
fn sparse_maps_that_lie() {
    for map in [
        "0,5,4,2",
        "9999999,1",
        "0,1",
        "0",
        "x,1",
        "18446744073709551615,6",
    ] {
        let error = refused(|a| {
            a.pax(&[
                ("GNU.sparse.size", b"100"),
                ("GNU.sparse.map", map.as_bytes()),
            ]);
            a.file("f", b"abcdef", |_| {});
        });
        assert!(matches!(error, ErofsError::Entry { .. }), "{map}: {error}");
    }
}
