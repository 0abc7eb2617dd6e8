//! [`Pax`]: the records of a PAX extended header.
//!
//! Parsing only; which record overrides what is in `tar`. The size of a header is bounded there.

use std::collections::BTreeMap;

use super::{MAX_SEGMENTS, Segment};

/// Key prefix of extended attributes, as star, GNU tar and Docker write them.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Records by key; an empty value takes a global record back.
#[derive(Debug, Clone, Default)]
pub(super) struct Pax {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Format 0.0 repeats its keys, so the pieces are gathered in order of appearance.
    pieces: Vec<Segment>,
}

impl Pax {
    /// Reads `<length> <key>=<value>\n` records.
    pub(super) fn parse(mut rest: &[u8]) -> Result<Self, String> {
        let bad = || "a damaged record".to_owned();
        let mut pax = Self::default();
        let mut offset = None;
        while !rest.is_empty() {
            let space = rest
                .iter()
                .take(20)
                .position(|&b| b == b' ')
                .ok_or_else(bad)?;
            let length = decimal(&rest[..space])
                .and_then(|l| usize::try_from(l).ok())
                .ok_or_else(bad)?;
            if length <= space + 1 || length > rest.len() || rest[length - 1] != b'\n' {
                return Err(bad());
            }
            let record = &rest[space + 1..length - 1];
            rest = &rest[length..];
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"GNU.sparse.offset" => offset = Some(decimal(value).ok_or_else(bad)?),
                b"GNU.sparse.numbytes" => {
                    let offset = offset.take().ok_or_else(bad)?;
                    pax.pieces.push(Segment {
                        offset,
                        length: decimal(value).ok_or_else(bad)?,
                    });
                    if pax.pieces.len() > MAX_SEGMENTS {
                        return Err("too many pieces of a sparse file".into());
                    }
                }
                _ => drop(pax.records.insert(key.to_vec(), value.to_vec())),
            }
        }
        Ok(pax)
    }

    /// Lets `other`, which is more local, override.
    pub(super) fn merge(&mut self, other: Self) {
        self.records.extend(other.records);
        self.pieces = other.pieces;
    }

    /// A record's value, unless empty.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.records
            .get(key.as_bytes())
            .map(Vec::as_slice)
            .filter(|v| !v.is_empty())
    }

    /// A whole number; the inner None means that it is none.
    pub(super) fn number(&self, key: &str) -> Option<Option<i64>> {
        self.get(key)
            .map(|v| decimal(v).and_then(|v| i64::try_from(v).ok()))
    }

    /// Seconds with an optional fraction, maybe negative; cut to nanoseconds.
    pub(super) fn time(&self, key: &str) -> Option<Option<(i64, u32)>> {
        self.get(key).map(|value| {
            let (negative, value) = match value.strip_prefix(b"-") {
                Some(rest) => (true, rest),
                None => (false, value),
            };
            let dot = value.iter().position(|&b| b == b'.').unwrap_or(value.len());
            let seconds = i64::try_from(decimal(&value[..dot])?).ok()?;
            let fraction = value.get(dot + 1..).unwrap_or(b"");
            if !fraction.iter().all(u8::is_ascii_digit) {
                return None;
            }
            let digits = fraction
                .iter()
                .copied()
                .chain(std::iter::repeat(b'0'))
                .take(9);
            let nanos = digits.fold(0u32, |n, digit| n * 10 + u32::from(digit - b'0'));
            Some(match (negative, nanos) {
                (false, _) => (seconds, nanos),
                (true, 0) => (-seconds, 0),
                (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
            })
        })
    }

    pub(super) fn xattrs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let named = |(key, value): (&Vec<u8>, &Vec<u8>)| {
            Some((key.strip_prefix(XATTR)?.to_vec(), value.clone()))
        };
        self.records.iter().filter_map(named).collect()
    }

    /// The real name of a sparse file; `path` is made up then.
    pub(super) fn sparse_name(&self) -> Option<&[u8]> {
        self.get("GNU.sparse.name")
    }

    /// The real size of a sparse file.
    pub(super) fn sparse_size(&self) -> Option<u64> {
        self.get("GNU.sparse.realsize")
            .or(self.get("GNU.sparse.size"))
            .and_then(decimal)
    }

    /// The pieces of formats 0.0 and 0.1.
    pub(super) fn sparse_map(&self) -> Option<Result<Vec<Segment>, String>> {
        let bad = || "its sparse map is damaged".to_owned();
        if let Some(map) = self.get("GNU.sparse.map") {
            let numbers: Option<Vec<u64>> = map.split(|&b| b == b',').map(decimal).collect();
            return Some(match numbers {
                Some(n) if n.len() % 2 == 0 && n.len() / 2 <= MAX_SEGMENTS => Ok(n
                    .chunks_exact(2)
                    .map(|p| Segment {
                        offset: p[0],
                        length: p[1],
                    })
                    .collect()),
                _ => Err(bad()),
            });
        }
        if self.pieces.is_empty() && self.get("GNU.sparse.numblocks").is_none() {
            return None;
        }
        Some(Ok(self.pieces.clone()))
    }
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn records_and_times() {
        let records = b"12 path=a=b\n22 mtime=1.0000000019\n30 SCHILY.xattr.user.x=a\0b\nc=\n";
        let pax = Pax::parse(records).unwrap();
        assert_eq!(pax.get("path"), Some(&b"a=b"[..]));
        assert_eq!(pax.time("mtime"), Some(Some((1, 1))));
        assert_eq!(pax.xattrs(), [(b"user.x".to_vec(), b"a\0b\nc=".to_vec())]);
        let time = |text: &str| {
            let record = format!(" mtime={text}\n");
            let length = (record.len()..record.len() + 3)
                .find(|l| l.to_string().len() + record.len() == *l)
                .unwrap();
            Pax::parse(format!("{length}{record}").as_bytes())
                .unwrap()
                .time("mtime")
                .unwrap()
        };
        assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time("-3"), Some((-3, 0)));
        assert_eq!(time("7.5"), Some((7, 500_000_000)));
        assert_eq!(time("x"), None);
        for bad in [
            &b"99 path=x\n"[..],
            b"path=x\n",
            b"7 path\n\n",
            b"0 a=b\n",
            b" a=b\n",
        ] {
            assert!(Pax::parse(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pax::parse(&bytes);
        }
    }
}
