//! Tests that the records contain the bytes of each stream for any chunks, with containerd's tags.

use super::*;
use crate::logs::stamp;
use proptest::prelude::*;

/// A parsed record.
pub(in crate::logs) struct LogRecord {
    pub stderr: bool,
    pub full: bool,
    pub bytes: Vec<u8>,
}

/// Parses a log as a kubelet does. Panics on an invalid log.
pub(in crate::logs) fn parse(log: &[u8]) -> Vec<LogRecord> {
    let mut records = Vec::new();
    let mut rest = log;
    while !rest.is_empty() {
        let end = memchr::memchr(b'\n', rest).expect("every record ends with a newline");
        let line = &rest[..end];
        rest = &rest[end + 1..];
        assert_eq!(
            (line[4], line[10], line[STAMP_BYTES - 1], line[STAMP_BYTES]),
            (b'-', b'T', b'Z', b' ')
        );
        let stderr = match &line[STAMP_BYTES + 1..STAMP_BYTES + 8] {
            b"stdout " => false,
            b"stderr " => true,
            other => panic!("stream {other:?}"),
        };
        let full = match &line[STAMP_BYTES + 8..STAMP_BYTES + 10] {
            b"F " => true,
            b"P " => false,
            other => panic!("tag {other:?}"),
        };
        records.push(LogRecord {
            stderr,
            full,
            bytes: line[STAMP_BYTES + 10..].to_vec(),
        });
    }
    records
}

/// Returns the bytes of one stream, with a newline after every full record.
pub(in crate::logs) fn bytes_of(records: &[LogRecord], stderr: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records.iter().filter(|record| record.stderr == stderr) {
        bytes.extend_from_slice(&record.bytes);
        if record.full {
            bytes.push(b'\n');
        }
    }
    bytes
}

fn format_all(chunks: &[(bool, Vec<u8>)]) -> (Vec<u8>, Formatter) {
    let stamp = stamp::format(0);
    let mut formatter = Formatter::default();
    let mut out = Vec::new();
    let mut offset = 0;
    for (stderr, data) in chunks {
        let stream = if *stderr {
            OutputStream::Stderr
        } else {
            OutputStream::Stdout
        };
        formatter.push(stream, offset, data, &stamp, &mut out);
        offset += data.len() as u64;
        assert!(formatter.written_offset() <= offset);
        assert!(offset - formatter.written_offset() <= MAX_HELD_BYTES);
    }
    (out, formatter)
}

fn lines(of: &[(bool, &[u8])]) -> Vec<(bool, Vec<u8>)> {
    let chunks: Vec<_> = of
        .iter()
        .map(|(stderr, data)| (*stderr, data.to_vec()))
        .collect();
    let (mut out, mut formatter) = format_all(&chunks);
    formatter.finish(&stamp::format(0), &mut out);
    parse(&out)
        .into_iter()
        .map(|record| (record.full, record.bytes))
        .collect()
}

#[test]
fn push_longest_line_makes_one_record() {
    let mut line = vec![b'x'; MAX_LINE_BYTES];
    line.push(b'\n');
    assert_eq!(
        lines(&[(false, &line)]),
        [(true, vec![b'x'; MAX_LINE_BYTES])]
    );
    line.insert(0, b'y');
    let mut first = vec![b'x'; MAX_LINE_BYTES];
    first[0] = b'y';
    assert_eq!(
        lines(&[(false, &line)]),
        [(false, first), (true, b"x".to_vec())]
    );
}

#[test]
fn push_separate_newline_ends_held_line() {
    assert_eq!(
        lines(&[(false, b"a"), (true, b"e\n"), (false, b"\n")]),
        [(true, b"e".to_vec()), (true, b"a".to_vec())]
    );
}

#[test]
fn terminal_formatter_removes_cr_before_newline_only() {
    let stamp = stamp::format(0);
    let (mut formatter, mut out) = (Formatter::for_terminal(), Vec::new());
    let mut offset = 0;
    for data in [&b"a\rb\r\nc\r"[..], b"\n", b"\r\nd\r"] {
        formatter.push(OutputStream::Stdout, offset, data, &stamp, &mut out);
        offset += data.len() as u64;
    }
    formatter.finish(&stamp, &mut out);
    let lines: Vec<_> = parse(&out).into_iter().map(|record| record.bytes).collect();
    assert_eq!(lines, [&b"a\rb"[..], b"c", b"", b"d\r"]);
}

#[test]
fn finish_without_newline_makes_partial_record() {
    assert_eq!(
        lines(&[(true, b"e"), (false, b"o")]),
        [(false, b"e".to_vec()), (false, b"o".to_vec())]
    );
    assert_eq!(lines(&[(false, b"\n")]), [(true, Vec::new())]);
}

#[test]
fn held_prompt_does_not_block_other_stream() {
    let mut chunks = vec![(true, b"$ ".to_vec())];
    chunks.extend((0..100).map(|_| (false, vec![b'\n'; 4096])));
    let (_, formatter) = format_all(&chunks);
    assert_eq!(formatter.written_offset(), 2 + 100 * 4096);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn records_contain_all_bytes_of_each_stream(
        chunks in prop::collection::vec(
            (any::<bool>(), prop_oneof![
                prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..64),
                (1usize..40_000, any::<u8>()).prop_map(|(n, byte)| vec![byte; n]),
            ]),
            0..40,
        )
    ) {
        let (mut out, mut formatter) = format_all(&chunks);
        formatter.finish(&stamp::format(0), &mut out);
        let records = parse(&out);
        for stderr in [false, true] {
            let wanted: Vec<u8> = chunks.iter().filter(|(s, _)| *s == stderr).flat_map(|(_, d)| d.clone()).collect();
            prop_assert_eq!(bytes_of(&records, stderr), wanted);
        }
        prop_assert!(records.iter().all(|record| record.bytes.len() <= MAX_LINE_BYTES));
        prop_assert!(records.iter().all(|record| !record.bytes.contains(&b'\n')));
    }
}
