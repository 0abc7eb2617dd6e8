//! [`DataWriter`]: file contents, written into the image as they come, with long runs of zeros left out.
//!
//! Knows no names. Called by `erofs` for each file; `image` then goes on writing behind the last block and fetches the
//! tails. A tail (what a file has behind its last whole block) of up to [`MAX_TAIL`] bytes goes beside its inode, which
//! is not placed before the end: until then tails wait in memory, or in an unnamed file once they are many.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::format::BLOCK;
use super::{ErofsError, ErofsResult};

/// Longest tail kept beside its inode, in bytes. More would often leave the rest of the inode's block empty.
pub(super) const MAX_TAIL: usize = 2048;
/// Tails kept in memory, in bytes.
const TAILS_IN_MEMORY: usize = 8 << 20;
/// Buffer between contents and file, in bytes.
const WRITE_BUFFER: usize = 1 << 20;
/// Smallest run of zeros that becomes a hole, as a power of two; also the unit of a sparse file's map. 64 KiB: large
/// enough that programs full of small zero runs stay in one piece.
const MIN_CHUNK_BITS: u32 = 16;
/// Entries of one file's map, so that it can't be much larger than what described it.
const MAX_CHUNKS: u64 = 1 << 16;
/// Entries of all maps of a layer.
const MAX_ALL_CHUNKS: u64 = 1 << 24;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Where a file's content lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Data {
    /// In one piece: whole blocks from `block` on, and a tail.
    Flat {
        size: u64,
        block: u32,
        tail: Option<Tail>,
    },
    /// In chunks of `1 << bits` bytes, some of which are holes.
    Chunked {
        size: u64,
        bits: u32,
        runs: Vec<Run>,
    },
}

impl Data {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Flat { size, .. } | Self::Chunked { size, .. } => *size,
        }
    }
}

/// A piece of the tails' store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tail {
    offset: u64,
    pub length: u16,
}

/// Chunks that have content and follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub chunk: u64,
    pub chunks: u64,
    pub block: u32,
}

/// See the module's header.
pub(super) struct DataWriter<'a> {
    out: BufWriter<&'a File>,
    file: &'a File,
    path: PathBuf,
    /// The block at which the file ends.
    next: u32,
    tails: tempfile::SpooledTempFile,
    tails_length: u64,
    /// Entries of all maps so far.
    chunks: u64,
    /// The current file's bytes that make no whole chunk yet.
    buffer: Vec<u8>,
}

impl<'a> DataWriter<'a> {
    /// Starts behind the superblock's block.
    pub(super) fn new(mut file: &'a File, path: &Path, scratch: &Path) -> ErofsResult<Self> {
        file.seek(SeekFrom::Start(BLOCK as u64))
            .map_err(|e| ErofsError::io("writing", path, e))?;
        Ok(Self {
            out: BufWriter::with_capacity(WRITE_BUFFER, file),
            file,
            path: path.to_path_buf(),
            next: 1,
            tails: tempfile::spooled_tempfile_in(TAILS_IN_MEMORY, scratch),
            tails_length: 0,
            chunks: 0,
            buffer: Vec::new(),
        })
    }

    /// Starts a file of exactly `size` bytes.
    pub(super) fn file(&mut self, size: u64) -> ErofsResult<FileWriter<'_, 'a>> {
        let mut bits = MIN_CHUNK_BITS;
        while size >> bits >= MAX_CHUNKS {
            bits += 1;
        }
        self.buffer.clear();
        let start = self.next;
        Ok(FileWriter {
            writer: self,
            size,
            bits,
            start,
            chunk: 0,
            runs: Vec::new(),
            holes: false,
        })
    }

    /// The block at which the file ends now.
    pub(super) fn next_block(&self) -> u32 {
        self.next
    }

    /// Appends `bytes` and fills their last block with zeros. Gives the first block.
    pub(super) fn append(&mut self, bytes: &[u8]) -> ErofsResult<u32> {
        let start = self.next;
        let blocks = u32::try_from(bytes.len().div_ceil(BLOCK)).ok();
        // 0xffffffff marks a hole.
        let next = blocks
            .and_then(|b| start.checked_add(b))
            .filter(|&next| next < u32::MAX);
        self.next = next.ok_or_else(|| ErofsError::TooLarge {
            what: "an EROFS image".into(),
            limit: u64::from(u32::MAX),
            unit: "blocks",
        })?;
        let padding = bytes.len().next_multiple_of(BLOCK) - bytes.len();
        self.out
            .write_all(bytes)
            .and_then(|()| self.out.write_all(&ZEROS[..padding]))
            .map_err(|e| ErofsError::io("writing", &self.path, e))?;
        Ok(start)
    }

    /// Reads a tail back.
    pub(super) fn tail(&mut self, tail: Tail, into: &mut Vec<u8>) -> ErofsResult<()> {
        let start = into.len();
        into.resize(start + usize::from(tail.length), 0);
        self.tails
            .seek(SeekFrom::Start(tail.offset))
            .and_then(|_| self.tails.read_exact(&mut into[start..]))
            .map_err(|e| ErofsError::io("reading the tails of", &self.path, e))
    }

    /// Writes what is buffered and then `first` as the first block.
    pub(super) fn finish(mut self, first: &[u8; BLOCK]) -> ErofsResult<()> {
        use std::os::unix::fs::FileExt;
        self.out
            .flush()
            .and_then(|()| self.file.write_all_at(first, 0))
            .map_err(|e| ErofsError::io("writing", &self.path, e))
    }

    fn keep_tail(&mut self, bytes: &[u8]) -> ErofsResult<Tail> {
        let tail = Tail {
            offset: self.tails_length,
            length: bytes.len() as u16,
        };
        self.tails
            .write_all(bytes)
            .map_err(|e| ErofsError::io("writing the tails of", &self.path, e))?;
        self.tails_length += bytes.len() as u64;
        Ok(tail)
    }
}

/// One file being written. The caller gives exactly the announced size.
pub(super) struct FileWriter<'w, 'a> {
    writer: &'w mut DataWriter<'a>,
    size: u64,
    bits: u32,
    /// Where its first block goes, if it has one.
    start: u32,
    /// Whole chunks so far, holes among them.
    chunk: u64,
    runs: Vec<Run>,
    holes: bool,
}

impl FileWriter<'_, '_> {
    fn chunk_size(&self) -> usize {
        1 << self.bits
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> ErofsResult<()> {
        while !bytes.is_empty() {
            let most = bytes
                .len()
                .min(self.chunk_size() - self.writer.buffer.len());
            self.writer.buffer.extend_from_slice(&bytes[..most]);
            bytes = &bytes[most..];
            if self.writer.buffer.len() == self.chunk_size() {
                self.whole_chunk()?;
            }
        }
        Ok(())
    }

    /// Writes `count` zeros without looking at each.
    pub(super) fn zeros(&mut self, mut count: u64) -> ErofsResult<()> {
        while count > 0 {
            if self.writer.buffer.is_empty() && count >> self.bits > 0 {
                let chunks = count >> self.bits;
                self.chunk += chunks;
                self.holes = true;
                count -= chunks << self.bits;
                continue;
            }
            let gap = (self.chunk_size() - self.writer.buffer.len()).min(ZEROS.len());
            let most = gap.min(usize::try_from(count).unwrap_or(usize::MAX));
            self.write(&ZEROS[..most])?;
            count -= most as u64;
        }
        Ok(())
    }

    /// Ends the file.
    pub(super) fn finish(mut self) -> ErofsResult<Data> {
        let rest = std::mem::take(&mut self.writer.buffer);
        let data = self.end(&rest);
        self.writer.buffer = rest;
        data
    }

    fn end(&mut self, rest: &[u8]) -> ErofsResult<Data> {
        let hole = rest.len() >= BLOCK && is_zero(rest);
        if !self.holes && !hole {
            let whole = rest.len() - rest.len() % BLOCK;
            let (whole, tail) = if rest.len() - whole > MAX_TAIL {
                (rest, &rest[..0])
            } else {
                rest.split_at(whole)
            };
            self.writer.append(whole)?;
            let tail = if tail.is_empty() {
                None
            } else {
                Some(self.writer.keep_tail(tail)?)
            };
            return Ok(Data::Flat {
                size: self.size,
                block: self.start,
                tail,
            });
        }
        let chunks = self.chunk + u64::from(!rest.is_empty());
        if !rest.is_empty() && !hole {
            let block = self.writer.append(rest)?;
            self.add(block);
        }
        self.writer.chunks += chunks;
        if self.writer.chunks > MAX_ALL_CHUNKS {
            let what = "the maps of all sparse files of a layer".into();
            return Err(ErofsError::TooLarge {
                what,
                limit: MAX_ALL_CHUNKS,
                unit: "entries",
            });
        }
        Ok(Data::Chunked {
            size: self.size,
            bits: self.bits,
            runs: std::mem::take(&mut self.runs),
        })
    }

    fn whole_chunk(&mut self) -> ErofsResult<()> {
        let chunk = std::mem::take(&mut self.writer.buffer);
        if is_zero(&chunk) {
            self.holes = true;
        } else {
            let block = self.writer.append(&chunk)?;
            self.add(block);
        }
        self.chunk += 1;
        self.writer.buffer = chunk;
        self.writer.buffer.clear();
        Ok(())
    }

    /// Notes that the current chunk lies at `block`.
    fn add(&mut self, block: u32) {
        // The file's chunks are written one after the other, so a run goes on as long as no hole comes between.
        match self.runs.last_mut() {
            Some(run) if run.chunk + run.chunks == self.chunk => run.chunks += 1,
            _ => self.runs.push(Run {
                chunk: self.chunk,
                chunks: 1,
                block,
            }),
        }
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // A comparison of slices is memcmp, also in a build that doesn't optimise.
    bytes
        .chunks(ZEROS.len())
        .all(|piece| *piece == ZEROS[..piece.len()])
}
