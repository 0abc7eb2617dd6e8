//! Header blocks of SPDY/3: name-value lists, compressed as one zlib stream per direction with a preset dictionary.
//!
//! The reader strips zlib's header and feeds the dictionary to a raw inflater as a stored block, which works with any
//! deflate library. The writer emits stored blocks, which are valid deflate; a server's header blocks are empty
//! lists. The inflated size and the number and size of headers are bounded, because the peer is untrusted.

use super::SpdyError;
use super::dictionary;
use flate2::{Decompress, FlushDecompress, Status};

/// Maximum size of an inflated header block; kubectl's are smaller than 200 bytes.
const MAX_BLOCK_BYTES: usize = 16 << 10;
/// Maximum number of headers in a block; kubectl sends up to three.
const MAX_HEADERS: u32 = 64;
/// Flag in the second byte of zlib's header: preset dictionary.
const FDICT: u8 = 0x20;

/// Names in lower case with their values, in the order of the block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Headers(pub Vec<(String, String)>);

impl Headers {
    /// Returns the first value of `name`, which must be in lower case, or "".
    pub(crate) fn get(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value.as_str())
    }
}

/// Decompression state of one direction. Unusable after an error.
#[derive(Debug)]
pub(crate) struct Inflater {
    raw: Decompress,
    started: bool,
}

impl Inflater {
    /// Creates the state for the start of a connection.
    pub(crate) fn new() -> Self {
        Self {
            raw: Decompress::new(false),
            started: false,
        }
    }

    /// Returns the headers of the next block.
    ///
    /// # Errors
    /// The block is not part of a zlib stream with SPDY's dictionary, too large, or not a header list.
    pub(crate) fn read(&mut self, mut block: &[u8]) -> Result<Headers, SpdyError> {
        if !self.started {
            block = self.start(block)?;
        }
        parse(&self.inflate(block)?)
    }

    /// Strips zlib's header from the first block.
    fn start<'a>(&mut self, block: &'a [u8]) -> Result<&'a [u8], SpdyError> {
        let bad = SpdyError::Headers("invalid zlib header");
        let [method, flags, rest @ ..] = block else {
            return Err(bad);
        };
        let head = u16::from_be_bytes([*method, *flags]);
        if method & 0x0f != 8 || head % 31 != 0 {
            return Err(bad);
        }
        self.started = true;
        if flags & FDICT == 0 {
            return Ok(rest);
        }
        let Some((id, rest)) = rest.split_first_chunk::<4>() else {
            return Err(bad);
        };
        if u32::from_be_bytes(*id) != dictionary::ID {
            return Err(SpdyError::Headers("unknown dictionary"));
        }
        self.inflate(&stored(&dictionary::bytes()))?;
        Ok(rest)
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut output = Vec::with_capacity(1 << 10);
        loop {
            if output.len() == output.capacity() {
                output.reserve(1 << 10);
            }
            let before = (self.raw.total_in(), output.len());
            let status = self
                .raw
                .decompress_vec(input, &mut output, FlushDecompress::Sync)
                .map_err(|_| SpdyError::Headers("invalid deflate data"))?;
            if output.len() > MAX_BLOCK_BYTES {
                return Err(SpdyError::Headers("block too large"));
            }
            let taken = usize::try_from(self.raw.total_in() - before.0).unwrap_or(input.len());
            input = &input[taken.min(input.len())..];
            match status {
                Status::StreamEnd => {
                    return Err(SpdyError::Headers("unexpected end of the zlib stream"));
                }
                _ if output.len() == output.capacity() => {}
                _ if input.is_empty() => return Ok(output),
                _ if taken == 0 && output.len() == before.1 => {
                    return Err(SpdyError::Headers("invalid deflate data"));
                }
                _ => {}
            }
        }
    }
}

/// Returns a stored, non-final deflate block. `bytes` must be at most 65,535 long.
fn stored(bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len() as u16;
    let mut block = Vec::with_capacity(bytes.len() + 5);
    block.push(0);
    block.extend_from_slice(&length.to_le_bytes());
    block.extend_from_slice(&(!length).to_le_bytes());
    block.extend_from_slice(bytes);
    block
}

fn parse(block: &[u8]) -> Result<Headers, SpdyError> {
    let mut rest = block;
    let count = number(&mut rest)?;
    if count > MAX_HEADERS {
        return Err(SpdyError::Headers("too many headers"));
    }
    let mut headers = Vec::new();
    for _ in 0..count {
        let name = text(&mut rest)?.to_ascii_lowercase();
        // Multiple values of a name are separated by NUL; lookups use the first.
        let value = text(&mut rest)?;
        let value = value.split('\0').next().unwrap_or_default().to_owned();
        headers.push((name, value));
    }
    if !rest.is_empty() {
        return Err(SpdyError::Headers("trailing data after the headers"));
    }
    Ok(Headers(headers))
}

fn number(rest: &mut &[u8]) -> Result<u32, SpdyError> {
    let (bytes, after) = rest
        .split_first_chunk::<4>()
        .ok_or(SpdyError::Headers("truncated block"))?;
    *rest = after;
    Ok(u32::from_be_bytes(*bytes))
}

fn text(rest: &mut &[u8]) -> Result<String, SpdyError> {
    let length = number(rest)? as usize;
    if length > rest.len() {
        return Err(SpdyError::Headers("truncated block"));
    }
    let (bytes, after) = rest.split_at(length);
    *rest = after;
    String::from_utf8(bytes.to_vec()).map_err(|_| SpdyError::Headers("header is not UTF-8"))
}

/// Compression state of one direction: a server sends only empty header lists.
#[derive(Debug, Default)]
pub(crate) struct Deflater {
    started: bool,
}

impl Deflater {
    /// Returns the next block, an empty header list.
    pub(crate) fn empty_block(&mut self) -> Vec<u8> {
        let mut block = Vec::with_capacity(16);
        if !self.started {
            self.started = true;
            // Deflate with a 32 KiB window, without dictionary.
            block.extend_from_slice(&[0x78, 0x01]);
        }
        block.extend(stored(&0u32.to_be_bytes()));
        // An empty block flushes readers that work block by block.
        block.extend(stored(&[]));
        block
    }
}
