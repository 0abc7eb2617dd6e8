//! [`TarReader`]: reads a tar stream entry by entry.
//!
//! Does not check names and links, see `tree`. Supports ustar, old V7, GNU (long names, base-256 numbers, sparse files) and
//! PAX (paths, sizes, times, owners, attributes, the three sparse formats of GNU). The crate tar is not used because it reads
//! GNU long names and PAX headers of any length into memory and does not support PAX sparse files.
//!
//! Formats: POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU tar manual "Sparse Formats". Unspecified details follow Go's
//! archive/tar, which containerd and Docker use to read layers.

mod pax;
mod sparse;

use std::io::{self, Read};

use super::{ErofsError, ErofsResult, reject, show};
use pax::{Pax, Records};
use sparse::check_segments;

const BLOCK_BYTES: usize = 512;
/// Maximum size of a long name, a PAX header or all global PAX records in bytes; the first two as in Go's archive/tar.
const MAX_SPECIAL_BYTES: u64 = 1 << 20;
/// Maximum number of segments of a sparse file.
const MAX_SEGMENTS: usize = 1 << 16;

/// Type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// A range of a file that has content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub offset: u64,
    pub length: u64,
}

/// Header of an entry.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: Vec<u8>,
    pub kind: EntryKind,
    /// Permissions, setuid, setgid and sticky bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and additional nanoseconds.
    pub mtime: (i64, u32),
    /// Target of a link.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Size of a file in bytes, including holes.
    pub size: u64,
    /// In ascending order and within `size`; their sum is the length of the entry's content in the stream.
    pub segments: Vec<Segment>,
}

/// Reader of a tar stream.
pub(crate) struct TarReader<'a, R> {
    input: R,
    what: &'a str,
    /// Bytes of the current entry that are not read yet.
    left: u64,
    /// Padding of its last block in bytes.
    padding: u64,
    global: Pax,
}

/// A header block.
struct Header([u8; BLOCK_BYTES]);

impl Header {
    fn bytes(&self, at: usize, length: usize) -> &[u8] {
        &self.0[at..at + length]
    }

    /// Returns a field up to its NUL.
    fn text(&self, at: usize, length: usize) -> &[u8] {
        let field = self.bytes(at, length);
        &field[..field.iter().position(|&b| b == 0).unwrap_or(length)]
    }

    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn is_gnu(&self) -> bool {
        self.bytes(257, 8) == b"ustar  \0"
    }

    fn name(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        let prefix = if self.bytes(257, 6) == b"ustar\0" {
            self.text(345, 155)
        } else {
            b""
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    /// Checks the sum of all bytes, with the sum's own field as spaces. Some old programs summed signed bytes.
    fn sum_is_right(&self) -> bool {
        let Some(want) = number(self.bytes(148, 8)) else {
            return false;
        };
        let in_sum = |at: usize| {
            if (148..156).contains(&at) {
                b' '
            } else {
                self.0[at]
            }
        };
        let unsigned: i64 = (0..BLOCK_BYTES).map(|at| i64::from(in_sum(at))).sum();
        let signed: i64 = (0..BLOCK_BYTES)
            .map(|at| i64::from(in_sum(at).cast_signed()))
            .sum();
        want == unsigned || want == signed
    }
}

impl<'a, R: Read> TarReader<'a, R> {
    /// Creates a reader; `what` names the stream in errors.
    pub(crate) fn new(input: R, what: &'a str) -> Self {
        Self {
            input,
            what,
            left: 0,
            padding: 0,
            global: Pax::default(),
        }
    }

    /// Returns the next entry, or `None` at the archive's end mark or at the end of the stream between two entries.
    pub(crate) fn next(&mut self) -> ErofsResult<Option<Entry>> {
        self.skip()?;
        let (mut local, mut long_name, mut long_link) = (None, None, None);
        loop {
            let Some(header) = self.header()? else {
                if local.is_some() || long_name.is_some() || long_link.is_some() {
                    return Err(self.corrupt("an entry after the extended header", "the end"));
                }
                return Ok(None);
            };
            match header.kind() {
                b'x' => {
                    local = Some(
                        Pax::parse(&self.special(&header)?)
                            .map_err(|e| self.corrupt("a PAX header", &e))?,
                    )
                }
                b'g' => {
                    let global = Pax::parse(&self.special(&header)?)
                        .map_err(|e| self.corrupt("a PAX header", &e))?;
                    self.global.merge(global);
                    if self.global.bytes() > MAX_SPECIAL_BYTES {
                        return Err(ErofsError::TooLarge {
                            subject: format!("the global PAX headers of {}", self.what),
                            limit: MAX_SPECIAL_BYTES,
                            unit: "bytes",
                        });
                    }
                }
                b'L' => long_name = Some(until_nul(self.special(&header)?)),
                b'K' => long_link = Some(until_nul(self.special(&header)?)),
                _ => {
                    let local = local.unwrap_or_default();
                    // Borrowed from `self` only for as long as the entry's header takes.
                    let global = std::mem::take(&mut self.global);
                    let pax = Records::new(&local, &global);
                    let entry = self.entry(&header, pax, long_name, long_link);
                    self.global = global;
                    return entry.map(Some);
                }
            }
        }
    }

    /// Reads at least one byte of the current entry. `name` is for the error.
    pub(crate) fn read(&mut self, name: &[u8], buffer: &mut [u8]) -> ErofsResult<usize> {
        let most = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.some(&mut buffer[..most])?;
        if read == 0 {
            return Err(self.corrupt(
                &format!("{} more bytes of {:?}", self.left, show(name)),
                "the end",
            ));
        }
        self.left -= read as u64;
        Ok(read)
    }

    fn entry(
        &mut self,
        header: &Header,
        pax: Records<'_>,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> ErofsResult<Entry> {
        let name = pax
            .sparse_name()
            .or(pax.get("path"))
            .map(<[u8]>::to_vec)
            .or(long_name)
            .unwrap_or_else(|| header.name());
        let link = pax.get("linkpath").map(<[u8]>::to_vec).or(long_link);
        let bad = |what: &str| reject(&name, format!("its header has a wrong {what}"));
        let field =
            |what: &str, at, length| number(header.bytes(at, length)).ok_or_else(|| bad(what));
        let kind = kind(header.kind(), &name).ok_or_else(|| {
            reject(
                &name,
                format!("has the unknown type {:?}", char::from(header.kind())),
            )
        })?;
        let owner = |key: &str, at| match pax.number(key) {
            Some(value) => value
                .and_then(|v| u32::try_from(v).ok())
                .ok_or_else(|| bad(key)),
            None => field(key, at, 8).and_then(|v| u32::try_from(v).map_err(|_| bad(key))),
        };
        let device = |at| match kind {
            EntryKind::Char | EntryKind::Block => field("device number", at, 8)
                .and_then(|v| u32::try_from(v).map_err(|_| bad("device number"))),
            _ => Ok(0),
        };
        let mtime = match pax.time("mtime") {
            Some(time) => time.ok_or_else(|| bad("mtime"))?,
            None => (field("mtime", 136, 12)?, 0),
        };
        let stored = match pax.number("size") {
            Some(value) => value
                .and_then(|v| u64::try_from(v).ok())
                .ok_or_else(|| bad("size"))?,
            None => {
                field("size", 124, 12).and_then(|v| u64::try_from(v).map_err(|_| bad("size")))?
            }
        };
        let entry = Entry {
            kind,
            mode: (field("mode", 100, 8)? & 0o7777) as u16,
            uid: owner("uid", 108)?,
            gid: owner("gid", 116)?,
            mtime,
            link: link.unwrap_or_else(|| header.text(157, 100).to_vec()),
            device: (device(329)?, device(337)?),
            xattrs: pax.xattrs(),
            size: 0,
            segments: Vec::new(),
            name,
        };
        if kind != EntryKind::File {
            // As in Go, no content follows such a header, regardless of its size.
            return Ok(entry);
        }
        self.left = stored;
        self.padding = (BLOCK_BYTES as u64 - stored % BLOCK_BYTES as u64) % BLOCK_BYTES as u64;
        self.with_content(entry, header, pax, stored)
    }

    /// Adds size and segments to the entry of a regular file.
    fn with_content(
        &mut self,
        mut entry: Entry,
        header: &Header,
        pax: Records<'_>,
        stored: u64,
    ) -> ErofsResult<Entry> {
        let (size, segments) = if header.kind() == b'S' {
            self.old_sparse(&entry.name, header)?
        } else if pax.get("GNU.sparse.major") == Some(b"1") {
            let size = pax
                .sparse_size()
                .ok_or_else(|| reject(&entry.name, "its sparse map has no size".into()))?;
            (size, self.inline_sparse_map(&entry.name)?)
        } else if let Some(map) = pax.sparse_map() {
            let map = map.map_err(|reason| reject(&entry.name, reason))?;
            let size = pax
                .sparse_size()
                .ok_or_else(|| reject(&entry.name, "its sparse map has no size".into()))?;
            (size, map)
        } else {
            (
                stored,
                vec![Segment {
                    offset: 0,
                    length: stored,
                }],
            )
        };
        check_segments(&segments, size, self.left).map_err(|reason| reject(&entry.name, reason))?;
        (entry.size, entry.segments) = (size, segments);
        Ok(entry)
    }

    /// Returns the next header block, or `None` at the end.
    fn header(&mut self) -> ErofsResult<Option<Header>> {
        let mut block = [0; BLOCK_BYTES];
        let mut have = 0;
        while have < BLOCK_BYTES {
            match self.some(&mut block[have..])? {
                0 if have == 0 => return Ok(None),
                0 => return Err(self.corrupt("a whole header", "the end")),
                read => have += read,
            }
        }
        if block.iter().all(|&b| b == 0) {
            return Ok(None);
        }
        let header = Header(block);
        if header.sum_is_right() {
            Ok(Some(header))
        } else {
            Err(self.corrupt("a tar header", "a block with a wrong sum"))
        }
    }

    /// Returns the content of a long name or PAX header.
    fn special(&mut self, header: &Header) -> ErofsResult<Vec<u8>> {
        let size = number(header.bytes(124, 12)).and_then(|v| u64::try_from(v).ok());
        let size = size.ok_or_else(|| self.corrupt("the size of an extended header", "none"))?;
        if size > MAX_SPECIAL_BYTES {
            let what = format!("an extended header of {}", self.what);
            return Err(ErofsError::TooLarge {
                subject: what,
                limit: MAX_SPECIAL_BYTES,
                unit: "bytes",
            });
        }
        let padded = (size as usize).next_multiple_of(BLOCK_BYTES);
        let mut content = vec![0; padded];
        self.exactly(&mut content, "an extended header")?;
        content.truncate(size as usize);
        Ok(content)
    }

    /// Skips the rest of the current entry.
    fn skip(&mut self) -> ErofsResult<()> {
        let mut rest = std::mem::take(&mut self.left) + std::mem::take(&mut self.padding);
        let mut buffer = [0; 8 * BLOCK_BYTES];
        while rest > 0 {
            let most = buffer
                .len()
                .min(usize::try_from(rest).unwrap_or(usize::MAX));
            match self.some(&mut buffer[..most])? {
                0 => return Err(self.corrupt(&format!("{rest} more bytes of an entry"), "the end")),
                read => rest -= read as u64,
            }
        }
        Ok(())
    }

    fn exactly(&mut self, buffer: &mut [u8], what: &str) -> ErofsResult<()> {
        let mut have = 0;
        while have < buffer.len() {
            match self.some(&mut buffer[have..])? {
                0 => return Err(self.corrupt(what, "the end")),
                read => have += read,
            }
        }
        Ok(())
    }

    fn some(&mut self, buffer: &mut [u8]) -> ErofsResult<usize> {
        loop {
            match self.input.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(read) => return Ok(read),
                Err(e) => return Err(self.corrupt("valid data to its end", &e.to_string())),
            }
        }
    }

    fn corrupt(&self, expected: &str, got: &str) -> ErofsError {
        ErofsError::Corrupt {
            subject: self.what.to_owned(),
            expected: expected.to_owned(),
            got: got.to_owned(),
        }
    }
}

fn kind(flag: u8, name: &[u8]) -> Option<EntryKind> {
    Some(match flag {
        b'0' | 0 if name.ends_with(b"/") => EntryKind::Dir,
        b'0' | 0 | b'7' | b'S' => EntryKind::File,
        b'1' => EntryKind::HardLink,
        b'2' => EntryKind::Symlink,
        b'3' => EntryKind::Char,
        b'4' => EntryKind::Block,
        b'5' => EntryKind::Dir,
        b'6' => EntryKind::Fifo,
        _ => return None,
    })
}

/// Parses a number of a header: octal text, or base 256 if the first bit is set. An empty field is zero.
fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        // Two's complement without the first bit; the second is the sign.
        let mut value: i128 = if field[0] & 0x40 != 0 { -1 } else { 0 };
        for (at, byte) in field.iter().enumerate() {
            let byte = if at == 0 {
                (byte & 0x7f) | if byte & 0x40 != 0 { 0x80 } else { 0 }
            } else {
                *byte
            };
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let text: Vec<u8> = field
        .iter()
        .copied()
        .skip_while(|b| *b == b' ')
        .take_while(|b| !matches!(b, 0 | b' '))
        .collect();
    text.iter().try_fold(0i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&b| b == 0) {
        bytes.truncate(end);
    }
    bytes
}

#[cfg(test)]
mod tests;
