//! Maps of sparse files in the stream itself: GNU's old format and PAX 1.0.
//!
//! Formats 0.0 and 0.1 are records of a PAX header, see `pax`. [`check_segments`] validates all of them.

use std::io::Read;

use super::{BLOCK_BYTES, Header, MAX_SEGMENTS, Segment, TarReader, number};
use crate::ErofsResult;
use crate::reject;

impl<R: Read> TarReader<'_, R> {
    /// Reads the map of GNU's old format: four segments in the header, more in the blocks after it.
    pub(super) fn old_sparse(
        &mut self,
        name: &[u8],
        header: &Header,
    ) -> ErofsResult<(u64, Vec<Segment>)> {
        let bad = || reject(name, "its sparse map is damaged".into());
        if !header.is_gnu() {
            return Err(bad());
        }
        let size = number(header.bytes(483, 12))
            .and_then(|v| u64::try_from(v).ok())
            .ok_or_else(bad)?;
        let mut segments = Vec::new();
        let mut take = |field: &[u8]| -> ErofsResult<()> {
            for piece in field.chunks_exact(24).take_while(|piece| piece[0] != 0) {
                let part = |bytes| {
                    number(bytes)
                        .and_then(|v| u64::try_from(v).ok())
                        .ok_or_else(bad)
                };
                segments.push(Segment {
                    offset: part(&piece[..12])?,
                    length: part(&piece[12..])?,
                });
            }
            if segments.len() > MAX_SEGMENTS {
                Err(bad())
            } else {
                Ok(())
            }
        };
        take(header.bytes(386, 96))?;
        let mut extended = header.0[482] != 0;
        while extended {
            let mut block = [0; BLOCK_BYTES];
            self.exactly(&mut block, "a sparse map")?;
            take(&block[..504])?;
            extended = block[504] != 0;
        }
        Ok((size, segments))
    }

    /// Reads the map of PAX format 1.0: decimal lines at the beginning of the content, padded to a block.
    pub(crate) fn inline_sparse_map(&mut self, name: &[u8]) -> ErofsResult<Vec<Segment>> {
        let bad = || reject(name, "its sparse map is damaged".into());
        let mut block = [0; BLOCK_BYTES];
        let mut at = BLOCK_BYTES;
        let mut line = |reader: &mut Self| -> ErofsResult<u64> {
            let mut value: u64 = 0;
            loop {
                if at == BLOCK_BYTES {
                    if reader.left < BLOCK_BYTES as u64 {
                        return Err(bad());
                    }
                    reader.exactly(&mut block, "a sparse map")?;
                    reader.left -= BLOCK_BYTES as u64;
                    at = 0;
                }
                let byte = block[at];
                at += 1;
                match byte {
                    b'\n' => return Ok(value),
                    b'0'..=b'9' => {
                        value = value
                            .checked_mul(10)
                            .and_then(|v| v.checked_add(u64::from(byte - b'0')))
                            .ok_or_else(bad)?;
                    }
                    _ => return Err(bad()),
                }
            }
        };
        let count = line(self)?;
        if count > MAX_SEGMENTS as u64 {
            return Err(bad());
        }
        (0..count)
            .map(|_| {
                Ok(Segment {
                    offset: line(self)?,
                    length: line(self)?,
                })
            })
            .collect()
    }
}

/// Checks that segments are in order, within the file, and as long as the content in the stream.
pub(crate) fn check_segments(segments: &[Segment], size: u64, stored: u64) -> Result<(), String> {
    let (mut at, mut sum) = (0, 0u64);
    for segment in segments {
        let end = segment
            .offset
            .checked_add(segment.length)
            .filter(|&end| end <= size);
        match end {
            Some(end) if segment.offset >= at => at = end,
            _ => return Err("its sparse map overlaps itself or the file's end".into()),
        }
        sum += segment.length;
    }
    if sum == stored {
        Ok(())
    } else {
        Err(format!(
            "its sparse map has {sum} bytes, its content {stored}"
        ))
    }
}
