//! [`LogFile`]: a file that log records are appended to, and how it is opened.
//!
//! A trait, so that tests can have disks that are full, short and slow. Nothing is retried here.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// Mode of a new log file: the kubelet's group may read it.
const MODE: u32 = 0o640;

/// An open log.
pub trait LogFile: Send {
    /// Appends a beginning of `bytes`, at least one byte.
    ///
    /// # Errors
    /// As write(2).
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// Takes the last `count` bytes back that were appended, so that the file ends with a whole record.
    ///
    /// # Errors
    /// As ftruncate(2).
    fn cut(&mut self, count: u64) -> io::Result<()>;
}

impl LogFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.write(bytes) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            other => other,
        }
    }

    fn cut(&mut self, count: u64) -> io::Result<()> {
        let length = self.metadata()?.size();
        self.set_len(length.saturating_sub(count))
    }
}

/// Opens a log: what the sink calls at Create and at every reopen.
pub type Opener = Arc<dyn Fn(&Path) -> io::Result<Box<dyn LogFile>> + Send + Sync>;

/// Opens real files: appended to, made with mode 0640 where missing. With `records`, a file that ends in the middle of a
/// record (a shim or a host that died while it wrote) gets a newline first, so that the next one is a line of its own.
pub fn opener(records: bool) -> Opener {
    Arc::new(move |path| {
        let mut file = OpenOptions::new()
            .append(true)
            .read(true)
            .create(true)
            .mode(MODE)
            .custom_flags(nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK)
            .open(path)?;
        let about = file.metadata()?;
        if records && about.is_file() && about.size() > 0 {
            let mut last = [0];
            file.read_exact_at(&mut last, about.size() - 1)?;
            if last[0] != b'\n' {
                file.write_all(b"\n")?;
            }
        }
        Ok(Box::new(file) as Box<dyn LogFile>)
    })
}
