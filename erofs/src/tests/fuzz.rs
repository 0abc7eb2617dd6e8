//! Fuzz test of the tar reader and the tree: archives of every kind of entry, damaged. Header checksums are repaired, or every
//! damaged header would be rejected by its checksum.

use super::*;
use boxlite_fuzz::Fuzz;

const BLOCK: usize = 512;

fn archive() -> Vec<u8> {
    let mut archive = Archive::new();
    archive.entry("d/", '5', |_| {}, b"");
    archive.file("d/f", b"content", |header| header.set_mode(0o4755));
    archive.link("d/h", '1', "d/f");
    archive.link("s", '2', "d/f");
    archive.pax(&[
        ("path", b"d/long"),
        ("SCHILY.xattr.user.x", b"value"),
        ("mtime", b"1.5"),
    ]);
    archive.file("long", b"y", |_| {});
    archive.file("d/.wh.gone", b"", |_| {});
    archive.file("d/.wh..wh..opq", b"", |_| {});
    archive.entry("null", '3', |_| {}, b"");
    archive.finish()
}

/// Sets the checksum of each block that looks like a header.
fn repair(bytes: &mut [u8]) {
    for block in bytes.as_chunks_mut::<BLOCK>().0 {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
}

#[test]
fn fuzz_archive_is_converted_or_rejected() {
    let words = [
        "../",
        "/",
        ".wh.",
        "GNU.sparse.map=",
        "31 path=",
        "size=",
        "\0",
    ];
    let fuzz = Fuzz::new("archive").seed(archive()).words(&words);
    fuzz.run(|input| {
        let mut input = input.to_vec();
        repair(&mut input);
        // An image of a few KiB of archive, or an error; `convert` checks that no temporary file remains.
        if let Ok(file) = convert(&input) {
            let size = file.as_file().metadata().unwrap().len();
            assert!(size < 64 << 20, "{size} bytes of image");
        }
    });
}
