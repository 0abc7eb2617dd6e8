//! [`Formatter`]: formats two byte streams as CRI log records: `<stamp> <stream> <F|P> <bytes>\n`.
//!
//! The format is containerd's: one record per line. A line longer than [`MAX_LINE_BYTES`] is split into records of that
//! size tagged P and a last one tagged F. Bytes without a newline at the end of a stream are tagged P. Bytes are not
//! changed.
//!
//! An incomplete line is held until its end arrives, and its bytes do not count as [`Formatter::written_offset`] until then.
//! If it delays the acknowledgement of more than [`MAX_HELD_BYTES`] of later output, it is written out, tagged P.

use super::stamp::STAMP_BYTES;
use boxlite_proto::boxlite::v1::OutputStream;

/// Maximum bytes of a line in one record; containerd's default (max_container_log_line_size).
pub use boxlite_proto::names::MAX_LOG_LINE_BYTES as MAX_LINE_BYTES;
/// Maximum output whose acknowledgement a held line may delay. Must be smaller than the guest's buffer, or a prompt on one
/// stream would block the other forever.
pub const MAX_HELD_BYTES: u64 = 128 << 10;

#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    /// Output offset of the first held byte.
    offset: u64,
}

/// State of the two streams.
#[derive(Debug, Default)]
pub struct Formatter {
    stdout: Held,
    stderr: Held,
    /// Offset after the last byte received.
    received: u64,
    /// Remove a carriage return before the newline of a line.
    trims_cr: bool,
}

impl Formatter {
    /// Creates the formatter of a process with a terminal, which ends lines with `\r\n`: the `\r` is removed, as containerd
    /// does.
    pub fn for_terminal() -> Self {
        Self {
            trims_cr: true,
            ..Self::default()
        }
    }

    /// Appends to `out` the records completed by `data`, which begins at `offset` of the output. Chunks must arrive in the
    /// order of their offsets.
    pub fn push(
        &mut self,
        stream: OutputStream,
        offset: u64,
        data: &[u8],
        stamp: &[u8; STAMP_BYTES],
        out: &mut Vec<u8>,
    ) {
        let held = match stream {
            OutputStream::Stderr => &mut self.stderr,
            OutputStream::Stdout | OutputStream::Unspecified => &mut self.stdout,
        };
        let mut rest = data;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end);
            let mut tail = split(stream, held, line, stamp, out);
            if self.trims_cr {
                match tail.strip_suffix(b"\r") {
                    Some(trimmed) => tail = trimmed,
                    None if tail.is_empty() && held.bytes.ends_with(b"\r") => {
                        held.bytes.pop();
                    }
                    None => {}
                }
            }
            record(stream, b'F', &held.bytes, tail, stamp, out);
            held.bytes.clear();
            rest = &after[1..];
        }
        if !rest.is_empty() {
            let before = held.bytes.len();
            let tail = split(stream, held, rest, stamp, out);
            if held.bytes.is_empty() || before > held.bytes.len() {
                held.offset = offset + (data.len() - tail.len()) as u64;
            }
            held.bytes.extend_from_slice(tail);
        }
        self.received = offset + data.len() as u64;
        self.release_held(stamp, out);
    }

    /// Returns the offset below which every byte is in a returned record.
    pub fn written_offset(&self) -> u64 {
        [&self.stdout, &self.stderr]
            .into_iter()
            .filter(|held| !held.bytes.is_empty())
            .map(|held| held.offset)
            .fold(self.received, u64::min)
    }

    /// Appends the held bytes, tagged P, after the end of both streams.
    pub fn finish(&mut self, stamp: &[u8; STAMP_BYTES], out: &mut Vec<u8>) {
        let mut held = [
            (OutputStream::Stdout, std::mem::take(&mut self.stdout)),
            (OutputStream::Stderr, std::mem::take(&mut self.stderr)),
        ];
        held.sort_by_key(|(_, held)| held.offset);
        for (stream, held) in held {
            if !held.bytes.is_empty() {
                record(stream, b'P', &held.bytes, &[], stamp, out);
            }
        }
    }

    fn release_held(&mut self, stamp: &[u8; STAMP_BYTES], out: &mut Vec<u8>) {
        let received = self.received;
        for (stream, held) in [
            (OutputStream::Stdout, &mut self.stdout),
            (OutputStream::Stderr, &mut self.stderr),
        ] {
            if !held.bytes.is_empty() && received - held.offset > MAX_HELD_BYTES {
                record(stream, b'P', &held.bytes, &[], stamp, out);
                held.bytes.clear();
            }
        }
    }
}

/// Writes P records of `held` + `line` while they exceed the size of one record, and returns the rest of `line`. If it
/// wrote one, `held` is empty afterwards.
fn split<'a>(
    stream: OutputStream,
    held: &mut Held,
    line: &'a [u8],
    stamp: &[u8; STAMP_BYTES],
    out: &mut Vec<u8>,
) -> &'a [u8] {
    let mut rest = line;
    while held.bytes.len() + rest.len() > MAX_LINE_BYTES {
        let (part, after) = rest.split_at(MAX_LINE_BYTES - held.bytes.len());
        record(stream, b'P', &held.bytes, part, stamp, out);
        held.bytes.clear();
        rest = after;
    }
    rest
}

fn record(
    stream: OutputStream,
    tag: u8,
    first: &[u8],
    second: &[u8],
    stamp: &[u8; STAMP_BYTES],
    out: &mut Vec<u8>,
) {
    let name: &[u8] = match stream {
        OutputStream::Stderr => b" stderr ",
        OutputStream::Stdout | OutputStream::Unspecified => b" stdout ",
    };
    out.extend_from_slice(stamp);
    out.extend_from_slice(name);
    out.extend_from_slice(&[tag, b' ']);
    out.extend_from_slice(first);
    out.extend_from_slice(second);
    out.push(b'\n');
}

#[cfg(test)]
pub(super) mod tests;
