//! [`BoundedLog`]: output of the guest's console or of the vmm child, bounded on disk and in memory.
//!
//! A hostile guest may print without end, so the VMMs do not write the file. They write to a pipe, and a thread of the shim
//! keeps the beginning on disk and the last lines in memory. Control characters are escaped on disk and removed in memory.

use boxlite_sys::sync::{Condvar, Mutex};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// Maximum bytes of one log on disk: a boot with kernel messages takes 30 KiB.
const MAX_DISK_BYTES: u64 = 1 << 20;
/// Number of lines kept in memory for error messages.
const TAIL_LINES: usize = 200;
/// Maximum bytes kept of one line; the rest is cut.
const MAX_LINE_BYTES: usize = 512;

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
                _ if self.open.len() < MAX_LINE_BYTES => self.open.push(byte),
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

/// Removes control characters: these lines appear in error messages and on terminals.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect::<String>()
        .trim_end()
        .to_owned()
}

/// Escapes control characters and bytes beyond ASCII, which could act on the terminal of a reader of the file.
fn escaped(bytes: &[u8]) -> Vec<u8> {
    let mut text = Vec::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'\n' | b'\t' | b' '..=b'~' => text.push(byte),
            // Terminals end lines with \r\n.
            b'\r' => {}
            _ => text.extend(format!("\\x{byte:02x}").as_bytes()),
        }
    }
    text
}

#[derive(Default)]
struct Shared {
    tail: Mutex<Tail>,
    ended: Condvar,
}

/// The last lines of a stream, shared between its reader and writers of error messages.
#[derive(Clone, Default)]
pub struct BoundedLog(Arc<Shared>);

impl BoundedLog {
    /// Reads `from` to its end, keeping the first MiB in `file` and the last lines in memory. Reading continues if the file
    /// cannot be written, because a full pipe would block the VM.
    pub fn follow(&self, from: impl Read, file: Option<File>) {
        self.read_all(from, file);
        self.lock().ended = true;
        self.0.ended.notify_all();
    }

    /// Waits at most `limit` for the end of the stream, which may state the cause of an exit.
    pub fn wait_end(&self, limit: Duration) {
        let running = |tail: &mut Tail| !tail.ended;
        drop(self.0.ended.wait_timeout_while(self.lock(), limit, running));
    }

    fn lock(&self) -> MutexGuard<'_, Tail> {
        self.0.tail.lock()
    }

    fn read_all(&self, mut from: impl Read, mut file: Option<File>) {
        let mut room = MAX_DISK_BYTES;
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
            if file.is_none() {
                continue;
            }
            let text = escaped(bytes);
            let kept = usize::try_from(room).unwrap_or(usize::MAX).min(text.len());
            if let Some(out) = &mut file
                && (room == 0 || out.write_all(&text[..kept]).is_err())
            {
                file = None;
            }
            room -= kept as u64;
        }
    }

    /// Returns at most the last `count` lines, oldest first, including an unfinished one.
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
