//! [`TarReader`]: the headers of a tar stream, one entry at a time.
//!
//! Decides nothing about names and links, see `tree`. Reads ustar, old V7, GNU (long names, base-256 numbers, sparse
//! files) and PAX (paths, sizes, times, owners, xattrs, GNU's three sparse formats). Own code and not the crate tar,
//! which reads a GNU long name or PAX header of any length into memory and knows no PAX sparse files.
//!
//! Layout: POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU tar manual "Sparse Formats". Where they leave room this follows Go's
//! archive/tar, since that reads layers in containerd and Docker.

mod pax;
mod sparse;

use std::io::{self, Read};

use super::{ErofsError, ErofsResult, refuse, show};
use pax::Pax;
use sparse::check_segments;

const BLOCK: usize = 512;
/// Largest long name or PAX header in bytes, as in Go's archive/tar.
const MAX_SPECIAL: u64 = 1 << 20;
/// Pieces of one sparse file.
const MAX_SEGMENTS: usize = 1 << 16;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKind {
    File,
    HardLink,
    Symlink,
    Char,
    Block,
    Dir,
    Fifo,
}

/// A piece of a file that has content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub offset: u64,
    pub length: u64,
}

/// One entry.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: Vec<u8>,
    pub kind: EntryKind,
    /// Permissions, setuid, setgid and sticky bits.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970 and the nanoseconds on top.
    pub mtime: (i64, u32),
    /// Target of a link.
    pub link: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Bytes of a file, holes included.
    pub size: u64,
    /// In order, within `size`, together exactly the entry's bytes in the stream.
    pub segments: Vec<Segment>,
}

/// See the module's header.
pub(super) struct TarReader<'a, R> {
    input: R,
    what: &'a str,
    /// Bytes of the current entry that haven't been read.
    left: u64,
    /// What fills its last block.
    padding: u64,
    global: Pax,
}

/// One header block.
struct Header([u8; BLOCK]);

impl Header {
    fn bytes(&self, at: usize, length: usize) -> &[u8] {
        &self.0[at..at + length]
    }

    /// A field up to its NUL.
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

    /// The sum of all bytes with the sum's own field as spaces; some old programs summed signed bytes.
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
        let unsigned: i64 = (0..BLOCK).map(|at| i64::from(in_sum(at))).sum();
        let signed: i64 = (0..BLOCK)
            .map(|at| i64::from(in_sum(at).cast_signed()))
            .sum();
        want == unsigned || want == signed
    }
}

impl<'a, R: Read> TarReader<'a, R> {
    /// `what` names the stream in errors.
    pub(super) fn new(input: R, what: &'a str) -> Self {
        Self {
            input,
            what,
            left: 0,
            padding: 0,
            global: Pax::default(),
        }
    }

    /// The next entry, None at the archive's end mark or at the stream's end between two entries.
    pub(super) fn next(&mut self) -> ErofsResult<Option<Entry>> {
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
                }
                b'L' => long_name = Some(until_nul(self.special(&header)?)),
                b'K' => long_link = Some(until_nul(self.special(&header)?)),
                _ => {
                    let mut pax = self.global.clone();
                    pax.merge(local.take().unwrap_or_default());
                    return self.entry(&header, pax, long_name, long_link).map(Some);
                }
            }
        }
    }

    /// Reads some of the current entry's bytes, at least one. `name` is for the error.
    pub(super) fn read(&mut self, name: &[u8], buffer: &mut [u8]) -> ErofsResult<usize> {
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
        pax: Pax,
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
        let bad = |what: &str| refuse(&name, format!("its header has a wrong {what}"));
        let field =
            |what: &str, at, length| number(header.bytes(at, length)).ok_or_else(|| bad(what));
        let kind = kind(header.kind(), &name).ok_or_else(|| {
            refuse(
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
            // As Go does: nothing follows such a header, whatever its size says.
            return Ok(entry);
        }
        self.left = stored;
        self.padding = (BLOCK as u64 - stored % BLOCK as u64) % BLOCK as u64;
        self.with_content(entry, header, &pax, stored)
    }

    /// Completes a regular file's entry by its size and segments.
    fn with_content(
        &mut self,
        mut entry: Entry,
        header: &Header,
        pax: &Pax,
        stored: u64,
    ) -> ErofsResult<Entry> {
        let (size, segments) = if header.kind() == b'S' {
            self.old_sparse(&entry.name, header)?
        } else if pax.get("GNU.sparse.major") == Some(b"1") {
            let size = pax
                .sparse_size()
                .ok_or_else(|| refuse(&entry.name, "its sparse map has no size".into()))?;
            (size, self.inline_sparse_map(&entry.name)?)
        } else if let Some(map) = pax.sparse_map() {
            let map = map.map_err(|reason| refuse(&entry.name, reason))?;
            let size = pax
                .sparse_size()
                .ok_or_else(|| refuse(&entry.name, "its sparse map has no size".into()))?;
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
        check_segments(&segments, size, self.left).map_err(|reason| refuse(&entry.name, reason))?;
        (entry.size, entry.segments) = (size, segments);
        Ok(entry)
    }

    /// The next header block, None at the end.
    fn header(&mut self) -> ErofsResult<Option<Header>> {
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
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

    /// The content of a long name or PAX header.
    fn special(&mut self, header: &Header) -> ErofsResult<Vec<u8>> {
        let size = number(header.bytes(124, 12)).and_then(|v| u64::try_from(v).ok());
        let size = size.ok_or_else(|| self.corrupt("the size of an extended header", "none"))?;
        if size > MAX_SPECIAL {
            let what = format!("an extended header of {}", self.what);
            return Err(ErofsError::TooLarge {
                what,
                limit: MAX_SPECIAL,
                unit: "bytes",
            });
        }
        let padded = (size as usize).next_multiple_of(BLOCK);
        let mut content = vec![0; padded];
        self.exactly(&mut content, "an extended header")?;
        content.truncate(size as usize);
        Ok(content)
    }

    /// Passes over what is left of the current entry.
    fn skip(&mut self) -> ErofsResult<()> {
        let mut rest = std::mem::take(&mut self.left) + std::mem::take(&mut self.padding);
        let mut buffer = [0; 8 * BLOCK];
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
            what: self.what.to_owned(),
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

/// A header's number: octal text, or base 256 when the first bit is set. Empty is zero.
fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        // Two's complement of the field without its first bit, sign from the second.
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
