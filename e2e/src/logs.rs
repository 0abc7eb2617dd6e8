//! Reading CRI log files: `<RFC 3339 with nanoseconds> <stdout|stderr> <F|P> <content>`.
//!
//! Strict: a line in any other form is a failure.

use crate::ensure;
use crate::failure::{During, Result};
use std::path::Path;

/// A line of the log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogLine {
    /// Timestamp as written.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// True if this completes the container's line (F), false if not (P).
    pub full: bool,
    /// Bytes of the container, including the newline if `full`.
    pub content: Vec<u8>,
}

/// Reads all lines.
pub(crate) fn read(path: &Path) -> Result<Vec<LogLine>> {
    let bytes = std::fs::read(path).during(path.display())?;
    let mut lines = Vec::new();
    for raw in bytes.split_inclusive(|&b| b == b'\n') {
        // The last line may be incomplete while the writer is running.
        if raw.ends_with(b"\n") {
            lines.push(parse(&raw[..raw.len() - 1])?);
        }
    }
    Ok(lines)
}

/// Parses a line without its newline.
pub(crate) fn parse(raw: &[u8]) -> Result<LogLine> {
    let mut parts = raw.splitn(4, |&b| b == b' ');
    let mut next = || {
        parts
            .next()
            .map(|p| String::from_utf8_lossy(p).into_owned())
            .unwrap_or_default()
    };
    let (time, stream, tag) = (next(), next(), next());
    let content = parts.next();
    let excerpt = || String::from_utf8_lossy(&raw[..raw.len().min(120)]).into_owned();
    ensure!(
        is_time(&time),
        "invalid line, no RFC 3339 time with nanoseconds: {:?}",
        excerpt()
    );
    ensure!(
        stream == "stdout" || stream == "stderr",
        "invalid line, no stream name: {:?}",
        excerpt()
    );
    ensure!(
        tag == "F" || tag == "P",
        "invalid line, no tag F or P: {:?}",
        excerpt()
    );
    let mut content = content.map(<[u8]>::to_vec).unwrap_or_default();
    if tag == "F" {
        content.push(b'\n');
    }
    Ok(LogLine {
        time,
        stream,
        full: tag == "F",
        content,
    })
}

/// Returns true for `2026-01-02T03:04:05.123456789Z` or the same with a numeric zone.
fn is_time(text: &str) -> bool {
    let Some((date, rest)) = text.split_once('T') else {
        return false;
    };
    let zone = rest
        .trim_end_matches('Z')
        .split(['+', '-'])
        .next()
        .unwrap_or_default();
    let Some((clock, nanos)) = zone.split_once('.') else {
        return false;
    };
    date.len() == 10
        && clock.len() == 8
        && nanos.len() == 9
        && nanos.bytes().all(|b| b.is_ascii_digit())
}

/// Returns the concatenated bytes of one stream.
pub(crate) fn stream(lines: &[LogLine], name: &str) -> Vec<u8> {
    lines
        .iter()
        .filter(|l| l.stream == name)
        .flat_map(|l| l.content.iter().copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_accepts_cri_lines_only() {
        let line = parse(b"2026-01-02T03:04:05.123456789Z stdout F a b").unwrap();
        assert_eq!(
            (line.stream.as_str(), line.content.as_slice()),
            ("stdout", b"a b\n".as_slice())
        );
        assert_eq!(
            parse(b"2026-01-02T03:04:05.123456789+00:00 stderr P x")
                .unwrap()
                .content,
            b"x"
        );
        for bad in [
            "",
            "x stdout F a",
            "2026-01-02T03:04:05Z stdout F a",
            "2026-01-02T03:04:05.123456789Z out F a",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
