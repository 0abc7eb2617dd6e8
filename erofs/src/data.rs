//! [`DataWriter`]: writes file contents into the image as they arrive, without long runs of zeros.
//!
//! Knows no names. The tail of a file (the bytes after its last whole block), if it has at most [`MAX_TAIL_BYTES`] bytes, belongs
//! next to the inode, whose position is known only at the end. Until then tails are in a [`Store`], as are the maps of sparse
//! files.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::format::{BLOCK_BYTES, HOLE};
use super::store::Store;
use super::{ErofsError, ErofsResult};

/// Longest tail next to its inode, in bytes. A longer one would often leave the rest of the inode's block empty.
pub(crate) const MAX_TAIL_BYTES: usize = 2048;
/// Capacity of the buffer of the image file, in bytes.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
/// Smallest run of zeros that becomes a hole, as a power of two; also the unit of a sparse file's map. With 64 KiB, programs
/// with many small runs of zeros are not split.
const MIN_CHUNK_BITS: u32 = 16;
/// Maximum number of entries in the map of one file.
const MAX_CHUNKS: u64 = 1 << 16;
/// Maximum number of entries in all maps of a layer.
const MAX_ALL_CHUNKS: u64 = 1 << 24;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A byte range of a [`Store`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Blob {
    pub offset: u64,
    pub length: u32,
}

/// Position of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    /// Contiguous: whole blocks from `block` on, then a tail, which may be empty.
    Flat { size: u64, block: u32, tail: Blob },
    /// In chunks of `1 << bits` bytes, some of which are holes. The map has the block of each chunk.
    Chunked { size: u64, bits: u32, map: Blob },
}

impl Data {
    /// No content.
    pub(crate) const EMPTY: Self = Self::Flat {
        size: 0,
        block: 0,
        tail: Blob {
            offset: 0,
            length: 0,
        },
    };

    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Flat { size, .. } | Self::Chunked { size, .. } => *size,
        }
    }
}

/// Consecutive chunks with content.
#[derive(Debug, Clone, Copy)]
struct Run {
    chunk: u64,
    chunks: u64,
    block: u32,
}

/// Appends the block of each chunk of a file.
fn encode_map(runs: &[Run], chunks: u64, bits: u32) -> Vec<u8> {
    let blocks_per_chunk = (1u64 << bits) / BLOCK_BYTES as u64;
    let mut out = Vec::with_capacity(4 * chunks as usize);
    let mut at = 0;
    for run in runs {
        (at..run.chunk).for_each(|_| out.extend(HOLE.to_le_bytes()));
        for chunk in 0..run.chunks {
            out.extend((run.block + (chunk * blocks_per_chunk) as u32).to_le_bytes());
        }
        at = run.chunk + run.chunks;
    }
    (at..chunks).for_each(|_| out.extend(HOLE.to_le_bytes()));
    out
}

/// Writer of an image's blocks.
pub(crate) struct DataWriter<'a> {
    out: BufWriter<&'a File>,
    file: &'a File,
    path: PathBuf,
    /// Length of the file in blocks.
    next: u32,
    /// Tails and maps.
    blobs: Store,
    /// Entries of all maps so far.
    chunks: u64,
    /// The incomplete chunk of the current file.
    buffer: Vec<u8>,
}

impl<'a> DataWriter<'a> {
    /// Starts after the block of the superblock.
    pub(crate) fn new(mut file: &'a File, path: &Path, scratch: &Path) -> ErofsResult<Self> {
        file.seek(SeekFrom::Start(BLOCK_BYTES as u64))
            .map_err(|e| ErofsError::io("write", path, e))?;
        Ok(Self {
            out: BufWriter::with_capacity(WRITE_BUFFER_BYTES, file),
            file,
            path: path.to_path_buf(),
            next: 1,
            blobs: Store::new(scratch),
            chunks: 0,
            buffer: Vec::new(),
        })
    }

    /// Starts a file of exactly `size` bytes.
    pub(crate) fn file(&mut self, size: u64) -> ErofsResult<FileWriter<'_, 'a>> {
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

    /// Length of the file in blocks.
    pub(crate) fn next_block(&self) -> u32 {
        self.next
    }

    /// Appends `bytes`, pads them to a whole block and returns the first block.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> ErofsResult<u32> {
        let start = self.next;
        let blocks = u32::try_from(bytes.len().div_ceil(BLOCK_BYTES)).ok();
        // 0xffffffff marks a hole.
        let next = blocks
            .and_then(|b| start.checked_add(b))
            .filter(|&next| next < u32::MAX);
        self.next = next.ok_or_else(|| ErofsError::TooLarge {
            subject: "an EROFS image".into(),
            limit: u64::from(u32::MAX),
            unit: "blocks",
        })?;
        let padding = bytes.len().next_multiple_of(BLOCK_BYTES) - bytes.len();
        self.out
            .write_all(bytes)
            .and_then(|()| self.out.write_all(&ZEROS[..padding]))
            .map_err(|e| ErofsError::io("write", &self.path, e))?;
        Ok(start)
    }

    /// Appends a tail or map to `out`.
    pub(crate) fn read(&self, blob: Blob, out: &mut Vec<u8>) -> ErofsResult<()> {
        let start = out.len();
        out.resize(start + blob.length as usize, 0);
        self.blobs
            .read_at(blob.offset, &mut out[start..])
            .map_err(|e| ErofsError::io("read the temporary file of", &self.path, e))
    }

    /// Writes the buffered blocks and then `first` as the first block.
    pub(crate) fn finish(mut self, first: &[u8; BLOCK_BYTES]) -> ErofsResult<()> {
        use std::os::unix::fs::FileExt;
        self.out
            .flush()
            .and_then(|()| self.file.write_all_at(first, 0))
            .map_err(|e| ErofsError::io("write", &self.path, e))
    }

    fn keep(&mut self, bytes: &[u8]) -> ErofsResult<Blob> {
        let offset = self.blobs.append(bytes);
        Ok(Blob {
            offset: offset
                .map_err(|e| ErofsError::io("write the temporary file of", &self.path, e))?,
            length: bytes.len() as u32,
        })
    }
}

/// A file being written. The caller writes exactly the announced size.
pub(crate) struct FileWriter<'w, 'a> {
    writer: &'w mut DataWriter<'a>,
    size: u64,
    bits: u32,
    /// Its first block, if it has one.
    start: u32,
    /// Whole chunks so far, including holes.
    chunk: u64,
    runs: Vec<Run>,
    holes: bool,
}

impl FileWriter<'_, '_> {
    fn chunk_size(&self) -> usize {
        1 << self.bits
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> ErofsResult<()> {
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

    /// Writes `count` zeros; whole chunks of them become holes without being copied.
    pub(crate) fn zeros(&mut self, mut count: u64) -> ErofsResult<()> {
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
    pub(crate) fn finish(mut self) -> ErofsResult<Data> {
        let rest = std::mem::take(&mut self.writer.buffer);
        let data = self.end(&rest);
        self.writer.buffer = rest;
        data
    }

    fn end(&mut self, rest: &[u8]) -> ErofsResult<Data> {
        let hole = rest.len() >= BLOCK_BYTES && is_zero(rest);
        if !self.holes && !hole {
            let whole = rest.len() - rest.len() % BLOCK_BYTES;
            let (whole, tail) = if rest.len() - whole > MAX_TAIL_BYTES {
                (rest, &rest[..0])
            } else {
                rest.split_at(whole)
            };
            self.writer.append(whole)?;
            let tail = self.writer.keep(tail)?;
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
            return Err(ErofsError::TooLarge {
                subject: "the maps of all sparse files of a layer".into(),
                limit: MAX_ALL_CHUNKS,
                unit: "entries",
            });
        }
        let map = encode_map(&self.runs, chunks, self.bits);
        Ok(Data::Chunked {
            size: self.size,
            bits: self.bits,
            map: self.writer.keep(&map)?,
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

    /// Records the block of the current chunk.
    fn add(&mut self, block: u32) {
        // Chunks of a file are written in order, so a run continues until there is a hole.
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
    // Comparing slices is a memcmp, even in a build without optimization.
    bytes
        .chunks(ZEROS.len())
        .all(|piece| *piece == ZEROS[..piece.len()])
}
