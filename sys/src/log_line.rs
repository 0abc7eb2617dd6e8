//! [`escape_line`] and [`EscapedWriter`]: each log event as one line.
//!
//! Values of a log event may come from a guest, a registry or a client. A newline in one would let its author write a line that
//! looks like the program's own, and other control characters act on the terminal of the reader. Used by the subscribers of
//! the daemon and the shim; no policy about levels and files.

use std::io::{self, Write};

/// Maximum length of a line in bytes; the rest of the event is cut.
const MAX_LINE_BYTES: usize = 16 << 10;

/// Returns the event as one line: control characters are escaped, except for the final newline.
pub fn escape_line(event: &[u8]) -> Vec<u8> {
    let body = event.strip_suffix(b"\n").unwrap_or(event);
    let cut = body.len() > MAX_LINE_BYTES;
    let text = String::from_utf8_lossy(&body[..body.len().min(MAX_LINE_BYTES)]);
    let mut line = String::with_capacity(text.len() + 1);
    for character in text.chars() {
        match character.is_control() {
            true => line.extend(character.escape_default()),
            false => line.push(character),
        }
    }
    if cut {
        line.push('…');
    }
    line.push('\n');
    line.into_bytes()
}

/// Writer that treats each call as one event, as tracing's formatter does.
#[derive(Debug)]
pub struct EscapedWriter<W>(W);

impl<W: Write> EscapedWriter<W> {
    /// Creates a writer of lines into `inner`.
    pub fn new(inner: W) -> Self {
        Self(inner)
    }
}

impl<W: Write> Write for EscapedWriter<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        self.0.write_all(&escape_line(event))?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_with_newlines_and_controls_is_one_line() {
        let mut out = Vec::new();
        let event = "WARN reason=\"x\n2026-01-01 ERROR forged\r\u{1b}[2J\u{9b}1mé\"\n";
        EscapedWriter::new(&mut out)
            .write_all(event.as_bytes())
            .unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text,
            "WARN reason=\"x\\n2026-01-01 ERROR forged\\r\\u{1b}[2J\\u{9b}1mé\"\n"
        );
    }

    #[test]
    fn long_event_is_cut() {
        let line = escape_line(&vec![b'x'; 1 << 20]);
        assert_eq!(line.len(), MAX_LINE_BYTES + "…\n".len());
        assert_eq!(escape_line(b"\xff"), "\u{fffd}\n".as_bytes());
    }
}
