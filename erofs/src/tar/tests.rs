//! Tests of numbers and sparse maps; whole archives are in the crate's `tests`.

use super::sparse::check_segments;
use super::*;

#[test]
fn number_parses_octal_and_base_256() {
    assert_eq!(number(b"0000644\0"), Some(0o644));
    assert_eq!(number(b"  644 \0\0"), Some(0o644));
    assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
    assert_eq!(number(b"12x\0\0\0\0\0"), None);
    let mut big = [0; 12];
    big[0] = 0x80;
    big[4..].copy_from_slice(&(9u64 << 33).to_be_bytes());
    assert_eq!(number(&big), Some(9 << 33));
    assert_eq!(number(&[0xff; 12]), Some(-1));
    big[1] = 1;
    assert_eq!(number(&big), None);
}

#[test]
fn check_segments_rejects_inconsistent_maps() {
    let s = |offset, length| Segment { offset, length };
    assert!(check_segments(&[s(0, 2), s(4, 2)], 10, 4).is_ok());
    assert!(check_segments(&[], 10, 0).is_ok());
    for (map, size, stored) in [
        (vec![s(4, 2), s(0, 2)], 10, 4),
        (vec![s(0, 5), s(4, 2)], 10, 7),
        (vec![s(8, 4)], 10, 4),
        (vec![s(0, 4)], 10, 5),
        (vec![s(u64::MAX, 4)], 10, 4),
    ] {
        assert!(check_segments(&map, size, stored).is_err(), "{map:?}");
    }
}
