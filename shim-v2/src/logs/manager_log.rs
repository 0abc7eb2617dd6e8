//! [`ManagerLog`]: the shim's warnings in containerd's log.
//!
//! containerd creates the FIFO `log` in the bundle before it runs a shim and copies what arrives there to its own log, where
//! an operator looks first. Without the FIFO (boxlite-cri) nothing is written. Nothing here waits: a line is dropped if
//! containerd does not run or does not read, and `shim.log` has it in any case.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Name of the FIFO in the bundle.
const FIFO: &str = "log";
/// Maximum length of a line in bytes. Up to PIPE_BUF (4096), a pipe takes a line as a whole or not at all.
const MAX_LINE_BYTES: usize = 4096;

/// Writer of lines to the FIFO.
#[derive(Debug)]
pub(super) struct ManagerLog {
    path: PathBuf,
    /// Start of each line: several shims write to the same log.
    prefix: String,
    /// Open from the first line until containerd ends.
    fifo: Option<File>,
}

impl ManagerLog {
    /// Creates the writer of the shim with this bundle, whose lines are attributed to `subject`.
    pub(super) fn new(bundle: &Path, subject: &str) -> Self {
        Self {
            path: bundle.join(FIFO),
            prefix: format!("containerd-shim-boxlite-v2 {subject}: "),
            fifo: None,
        }
    }

    /// Sends a line, which ends with a newline.
    pub(super) fn send(&mut self, line: &[u8]) {
        let mut message = self.prefix.clone().into_bytes();
        message.extend_from_slice(line);
        if message.len() > MAX_LINE_BYTES {
            message.truncate(MAX_LINE_BYTES - 1);
            message.push(b'\n');
        }
        // The reader of a FIFO that is open already may have ended.
        if !self.write(&message) {
            self.write(&message);
        }
    }

    /// Returns false if the FIFO had to be closed.
    fn write(&mut self, message: &[u8]) -> bool {
        let Some(mut fifo) = self.fifo.take().or_else(|| open(&self.path)) else {
            return true;
        };
        match fifo.write(message) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return false,
            _ => self.fifo = Some(fifo),
        }
        true
    }
}

/// Opens the FIFO; None if it does not exist or has no reader.
fn open(path: &Path) -> Option<File> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .ok()?;
    let kind = file.metadata().ok()?.file_type();
    kind.is_fifo().then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::io::Read;

    /// Opens the FIFO as containerd does.
    fn reader(path: &Path) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .expect("the FIFO")
    }

    fn read(reader: &mut File) -> String {
        let mut buffer = vec![0; 1 << 16];
        let count = reader.read(&mut buffer).expect("lines");
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    }

    #[test]
    fn lines_arrive_in_each_reader() {
        let bundle = tempfile::tempdir().expect("tempdir");
        let path = bundle.path().join(FIFO);
        let mut log = ManagerLog::new(bundle.path(), "ns/a");
        log.send(b"WARN no FIFO\n");
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o700)).expect("a FIFO");
        log.send(b"WARN no reader\n");
        for text in ["one", "two"] {
            let mut reader = reader(&path);
            log.send(format!("WARN {text}\n").as_bytes());
            assert_eq!(
                read(&mut reader),
                format!("containerd-shim-boxlite-v2 ns/a: WARN {text}\n")
            );
        }
    }

    #[test]
    fn reader_that_does_not_read_drops_whole_lines() {
        let bundle = tempfile::tempdir().expect("tempdir");
        let path = bundle.path().join(FIFO);
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o700)).expect("a FIFO");
        let mut reader = reader(&path);
        let mut log = ManagerLog::new(bundle.path(), "ns/a");
        let long = format!("{}\n", "x".repeat(2 * MAX_LINE_BYTES));
        for _ in 0..100 {
            log.send(long.as_bytes());
        }
        let text = read(&mut reader);
        assert!(text.len() >= MAX_LINE_BYTES && text.ends_with("x\n"));
        for line in text.lines() {
            assert_eq!(line.len(), MAX_LINE_BYTES - 1, "{line}");
        }
        log.send(b"WARN later\n");
        assert!(read(&mut reader).ends_with(": WARN later\n"));
    }

    #[test]
    fn other_files_are_not_written() {
        let bundle = tempfile::tempdir().expect("tempdir");
        let path = bundle.path().join(FIFO);
        std::fs::write(&path, "").expect("a file");
        ManagerLog::new(bundle.path(), "ns/a").send(b"WARN x\n");
        assert_eq!(std::fs::read(&path).expect("the file"), b"");
    }
}
