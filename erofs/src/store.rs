//! [`Store`]: bytes of unbounded length in bounded memory; the excess is in an unnamed temporary file.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes kept in memory. Most layers need no file.
const MEMORY_BYTES: usize = 2 << 20;

/// Bytes read from the file at a time: neighbors are often read next.
const WINDOW_BYTES: usize = 8 << 10;

/// Appendable bytes with random access.
pub(crate) struct Store {
    directory: PathBuf,
    file: Option<File>,
    /// Bytes in the file; those after them are in `buffer`.
    flushed: u64,
    buffer: Vec<u8>,
    /// Offset and content of the last read from the file.
    window: RefCell<(u64, Vec<u8>)>,
}

impl Store {
    /// Creates an empty store whose file, if it needs one, is in `directory`.
    pub(crate) fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_path_buf(),
            file: None,
            flushed: 0,
            buffer: Vec::new(),
            window: RefCell::default(),
        }
    }

    /// Appends `bytes` and returns their offset.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        if self.buffer.len() + bytes.len() > MEMORY_BYTES {
            self.flush()?;
        }
        let offset = self.flushed + self.buffer.len() as u64;
        self.buffer.extend_from_slice(bytes);
        Ok(offset)
    }

    /// Fills `bytes` from `offset` on.
    pub(crate) fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let in_file = self.split(offset, bytes.len());
        let (first, second) = bytes.split_at_mut(in_file);
        if !first.is_empty() {
            self.read_file(offset, first)?;
        }
        let start = offset.saturating_sub(self.flushed) as usize;
        let found = self.buffer.get(start..start + second.len());
        second.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    /// Fills `bytes` from the file.
    fn read_file(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::UnexpectedEof)?;
        if bytes.len() > WINDOW_BYTES {
            return file.read_exact_at(bytes, offset);
        }
        let (start, window) = &mut *self.window.borrow_mut();
        let position = |start: u64| usize::try_from(offset.checked_sub(start)?).ok();
        let cached = position(*start).and_then(|at| window.get(at..at + bytes.len()));
        if let Some(cached) = cached {
            bytes.copy_from_slice(cached);
            return Ok(());
        }
        // Bytes before the end of the file never change but by `write_at`.
        window.resize(self.split(offset, WINDOW_BYTES), 0);
        *start = offset;
        file.read_exact_at(window, offset)?;
        bytes.copy_from_slice(&window[..bytes.len()]);
        Ok(())
    }

    /// Overwrites existing bytes from `offset` on.
    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let in_file = self.split(offset, bytes.len());
        let (first, second) = bytes.split_at(in_file);
        if let Some(file) = self.file.as_ref().filter(|_| !first.is_empty()) {
            file.write_all_at(first, offset)?;
            self.window.get_mut().1.clear();
        }
        let start = offset.saturating_sub(self.flushed) as usize;
        let found = self.buffer.get_mut(start..start + second.len());
        found
            .ok_or(io::ErrorKind::UnexpectedEof)?
            .copy_from_slice(second);
        Ok(())
    }

    /// Number of the `length` bytes from `offset` on that are in the file.
    fn split(&self, offset: u64, length: usize) -> usize {
        let in_file = self.flushed.saturating_sub(offset);
        usize::try_from(in_file).unwrap_or(usize::MAX).min(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(&self.directory)?),
        };
        file.write_all_at(&self.buffer, self.flushed)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn store_beyond_its_memory_returns_every_byte() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::new(directory.path());
        let piece: Vec<u8> = (0..=u8::MAX).cycle().take(100_003).collect();
        let offsets: Vec<u64> = (0..50).map(|_| store.append(&piece).unwrap()).collect();
        assert!(store.file.is_some());
        store.write_at(offsets[30], b"changed").unwrap();
        store.write_at(offsets[49], b"changed").unwrap();
        // Across the end of the file.
        store.write_at(store.flushed - 3, b"changed").unwrap();
        let mut across = [0; 7];
        store.read_at(store.flushed - 3, &mut across).unwrap();
        assert_eq!(&across, b"changed");
        let mut found = vec![0; piece.len()];
        for (index, offset) in offsets.iter().enumerate() {
            assert_eq!(*offset, (index * piece.len()) as u64);
            store.read_at(*offset, &mut found).unwrap();
            let same = found[7..] == piece[7..];
            let boundary = store.flushed - 3 < offset + 100_003 && store.flushed + 4 > *offset;
            assert!(same || boundary, "piece {index}");
            assert_eq!(
                &found[..7] == b"changed",
                matches!(index, 30 | 49),
                "piece {index}"
            );
        }
        assert!(store.read_at(50 * 100_003, &mut [0]).is_err());
    }
}
