//! [`BoundedLog`]: what the guest's console or the vmm child printed, bounded on disk and in memory.
//!
//! The guest is hostile: it may print for ever. So neither VMM writes the file itself; both write into a pipe, and a
//! thread of the shim keeps the head of what comes on disk and the tail in memory.

use boxlite_sys::sync::{Condvar, Mutex};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// Bytes of one log kept on disk: a boot with kernel messages is 30 KiB.
const DISK_LIMIT: u64 = 1 << 20;
/// Lines kept in memory for error messages.
const TAIL_LINES: usize = 200;
/// Bytes of one line kept; the rest of it is cut.
const LINE_LIMIT: usize = 512;

#[derive(Default)]
struct Tail {
    lines: VecDeque<String>,
    open: Vec<u8>,
    ended: bool,
}

impl Tail {
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.close_line(),
                _ if self.open.len() < LINE_LIMIT => self.open.push(byte),
                _ => {}
            }
        }
    }

    fn close_line(&mut self) {
        let line = printable(&self.open);
        self.open.clear();
        if line.is_empty() {
            return;
        }
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

/// No control characters: these lines end up in error messages and on terminals.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect::<String>()
        .trim_end()
        .to_owned()
}

#[derive(Default)]
struct Shared {
    tail: Mutex<Tail>,
    ended: Condvar,
}

/// The last lines of a stream, shared between its reader and whoever writes an error message.
#[derive(Clone, Default)]
pub struct BoundedLog(Arc<Shared>);

impl BoundedLog {
    /// Reads `from` until its end, keeping the first MiB in `file` and the last lines in memory. A disk that cannot be
    /// written is no reason to stop reading: a full pipe would stop the VM.
    pub fn follow(&self, from: impl Read, file: Option<PathBuf>) {
        self.read_all(from, file);
        self.lock().ended = true;
        self.0.ended.notify_all();
    }

    /// Waits until the stream has ended, at most for `limit`: what ended may have said why just before.
    pub fn wait_end(&self, limit: Duration) {
        let running = |tail: &mut Tail| !tail.ended;
        drop(self.0.ended.wait_timeout_while(self.lock(), limit, running));
    }

    fn lock(&self) -> MutexGuard<'_, Tail> {
        self.0.tail.lock()
    }

    fn read_all(&self, mut from: impl Read, file: Option<PathBuf>) {
        let mut file = file.and_then(|path| File::create(path).ok());
        let mut room = DISK_LIMIT;
        let mut buffer = [0u8; 4096];
        loop {
            let count = match from.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let bytes = &buffer[..count];
            self.lock().push(bytes);
            let kept = usize::try_from(room).unwrap_or(usize::MAX).min(count);
            if let Some(out) = &mut file
                && (kept == 0 || out.write_all(&bytes[..kept]).is_err())
            {
                file = None;
            }
            room -= kept as u64;
        }
    }

    /// At most the last `count` lines, oldest first, an unfinished one included.
    pub fn tail(&self, count: usize) -> Vec<String> {
        let tail = self.lock();
        let mut lines: Vec<String> = tail.lines.iter().cloned().collect();
        let open = printable(&tail.open);
        if !open.is_empty() {
            lines.push(open);
        }
        lines.split_off(lines.len().saturating_sub(count))
    }
}
