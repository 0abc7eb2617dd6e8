//! [`LogFile`]: the trait of a log file, and the opener of real files.
//!
//! A trait so that tests can simulate full disks and short writes. The caller retries.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// Mode of a new log file, readable by the kubelet's group.
const MODE: u32 = 0o640;

/// An open log file.
pub trait LogFile: Send {
    /// Appends at least one byte of `bytes` and returns the number of bytes written.
    ///
    /// # Errors
    /// The errors of write(2).
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Removes the last `count` bytes, so that the file ends with a complete record.
    ///
    /// # Errors
    /// The errors of ftruncate(2).
    fn truncate_tail(&mut self, count: u64) -> io::Result<()>;
}

impl LogFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.write(bytes) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            other => other,
        }
    }

    fn truncate_tail(&mut self, count: u64) -> io::Result<()> {
        let length = self.metadata()?.size();
        self.set_len(length.saturating_sub(count))
    }
}

/// Function that opens a log, called at Create and at every reopen.
pub type Opener = Arc<dyn Fn(&Path) -> io::Result<Box<dyn LogFile>> + Send + Sync>;

/// Returns an opener of real files in append mode, created with mode 0640. With `records`, a newline is appended to a file
/// that ends in the middle of a record (after a crash of the shim or the host), so that the next record begins a line.
pub fn opener(records: bool) -> Opener {
    Arc::new(move |path| {
        let mut file = OpenOptions::new()
            .append(true)
            .read(true)
            .create(true)
            .mode(MODE)
            .custom_flags(nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK)
            .open(path)?;
        let metadata = file.metadata()?;
        if records && metadata.is_file() && metadata.size() > 0 {
            let mut last = [0];
            file.read_exact_at(&mut last, metadata.size() - 1)?;
            if last[0] != b'\n' {
                file.write_all(b"\n")?;
            }
        }
        Ok(Box::new(file) as Box<dyn LogFile>)
    })
}
