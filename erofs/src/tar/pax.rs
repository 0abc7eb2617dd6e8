//! [`Pax`]: the records of a PAX extended header; [`Records`]: those that apply to an entry.
//!
//! Unknown records are dropped. `tar` limits the size of a header and of all global records.

use std::collections::BTreeMap;

use super::{MAX_SEGMENTS, Segment};

/// Key prefix of extended attributes, as star, GNU tar and Docker write them.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// Records with other keys have no meaning for an image.
const KEYS: [&[u8]; 12] = [
    b"path",
    b"linkpath",
    b"size",
    b"mtime",
    b"uid",
    b"gid",
    b"GNU.sparse.name",
    b"GNU.sparse.size",
    b"GNU.sparse.realsize",
    b"GNU.sparse.major",
    b"GNU.sparse.map",
    b"GNU.sparse.numblocks",
];

/// Records of one or several headers.
#[derive(Debug, Default)]
pub(crate) struct Pax {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Format 0.0 repeats its keys, so the segments are gathered in order of appearance.
    segments: Vec<Segment>,
}

impl Pax {
    /// Parses records `<length> <key>=<value>\n`.
    pub(crate) fn parse(mut rest: &[u8]) -> Result<Self, String> {
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
                    pax.segments.push(Segment {
                        offset,
                        length: decimal(value).ok_or_else(bad)?,
                    });
                    if pax.segments.len() > MAX_SEGMENTS {
                        return Err("too many segments of a sparse file".into());
                    }
                }
                key if KEYS.contains(&key) || key.starts_with(XATTR) => {
                    pax.records.insert(key.to_vec(), value.to_vec());
                }
                _ => {}
            }
        }
        Ok(pax)
    }

    /// Adds the records of a later header, which override earlier ones.
    pub(crate) fn merge(&mut self, later: Self) {
        self.records.extend(later.records);
    }

    /// Length of all keys and values in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        let lengths = self.records.iter().map(|(k, v)| k.len() + v.len());
        lengths.sum::<usize>() as u64
    }
}

/// Records that apply to an entry: those of its header override the global ones.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Records<'a> {
    local: &'a Pax,
    global: &'a Pax,
}

impl<'a> Records<'a> {
    pub(crate) fn new(local: &'a Pax, global: &'a Pax) -> Self {
        Self { local, global }
    }

    /// Value of a record. An empty one removes a global record.
    pub(crate) fn get(&self, key: &str) -> Option<&'a [u8]> {
        let key = key.as_bytes();
        let value = self.local.records.get(key);
        value
            .or_else(|| self.global.records.get(key))
            .map(Vec::as_slice)
            .filter(|value| !value.is_empty())
    }

    /// Value of a record as an integer; the inner `None` means any other text.
    pub(crate) fn number(&self, key: &str) -> Option<Option<i64>> {
        self.get(key)
            .map(|v| decimal(v).and_then(|v| i64::try_from(v).ok()))
    }

    /// Value of a record as a time: seconds, possibly negative, with an optional fraction, truncated to nanoseconds.
    pub(crate) fn time(&self, key: &str) -> Option<Option<(i64, u32)>> {
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

    /// Names and values of extended attributes.
    pub(crate) fn xattrs(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let global = self.global.records.iter();
        let global = global.filter(|(key, _)| !self.local.records.contains_key(*key));
        let all = self.local.records.iter().chain(global);
        let named = |(key, value): (&Vec<u8>, &Vec<u8>)| {
            Some((key.strip_prefix(XATTR)?.to_vec(), value.clone()))
        };
        all.filter_map(named).collect()
    }

    /// Name of a sparse file, whose `path` is a substitute.
    pub(crate) fn sparse_name(&self) -> Option<&[u8]> {
        self.get("GNU.sparse.name")
    }

    /// Size of a sparse file in bytes, including holes.
    pub(crate) fn sparse_size(&self) -> Option<u64> {
        self.get("GNU.sparse.realsize")
            .or(self.get("GNU.sparse.size"))
            .and_then(decimal)
    }

    /// Segments of a sparse file in formats 0.0 and 0.1.
    pub(crate) fn sparse_map(&self) -> Option<Result<Vec<Segment>, String>> {
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
        if self.local.segments.is_empty() && self.get("GNU.sparse.numblocks").is_none() {
            return None;
        }
        Some(Ok(self.local.segments.clone()))
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
    fn parse_records_returns_values_and_times() {
        let records = b"12 path=a=b\n22 mtime=1.0000000019\n30 SCHILY.xattr.user.x=a\0b\nc=\n";
        let (pax, none) = (Pax::parse(records).unwrap(), Pax::default());
        let pax = Records::new(&pax, &none);
        assert_eq!(pax.get("path"), Some(&b"a=b"[..]));
        assert_eq!(pax.time("mtime"), Some(Some((1, 1))));
        assert_eq!(pax.xattrs(), [(b"user.x".to_vec(), b"a\0b\nc=".to_vec())]);
        let time = |text: &str| {
            let record = format!(" mtime={text}\n");
            let length = (record.len()..record.len() + 3)
                .find(|l| l.to_string().len() + record.len() == *l)
                .unwrap();
            let pax = Pax::parse(format!("{length}{record}").as_bytes()).unwrap();
            Records::new(&pax, &Pax::default()).time("mtime").unwrap()
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

    #[test]
    fn records_local_override_global() {
        let mut global =
            Pax::parse(b"9 path=a\n9 uid=12\n8 foo=x\n25 SCHILY.xattr.user.a=1\n").unwrap();
        assert_eq!(global.bytes(), 4 + 1 + 3 + 2 + 19 + 1);
        global.merge(Pax::parse(b"9 uid=13\n").unwrap());
        let local = Pax::parse(b"8 path=\n25 SCHILY.xattr.user.b=2\n").unwrap();
        let records = Records::new(&local, &global);
        assert_eq!(
            (records.get("path"), records.number("uid")),
            (None, Some(Some(13)))
        );
        let names: Vec<_> = records.xattrs().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [b"user.b", b"user.a"]);
    }

    proptest! {
        #[test]
        fn parse_any_bytes_returns(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pax::parse(&bytes);
        }
    }
}
