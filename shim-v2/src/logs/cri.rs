//! [`Formatter`]: two byte streams into CRI log records: `<stamp> <stream> <F|P> <bytes>\n`.
//!
//! As containerd writes them: a record per line, a line longer than [`LINE_LIMIT`] in records of exactly that many
//! bytes tagged P before its last one, tagged F; what a stream leaves without a newline at its end is tagged P. Bytes are
//! not touched. Pure: knows no file and no guest.
//!
//! A beginning of a line is held until its end comes, and its bytes are not [`Formatter::settled`] so long; a held
//! beginning that keeps more than [`HOLD_LIMIT`] of later output from being settled is written out, tagged P.

use super::stamp::WIDTH;
use boxlite_proto::boxlite::v1::OutputStream;

/// Bytes of a line in one record; containerd's default (max_container_log_line_size).
pub const LINE_LIMIT: usize = 16 << 10;
/// Output that one held beginning of a line may keep from being acknowledged, in bytes. Must stay below the guest's
/// buffer, or a prompt on one stream would block the other for ever.
pub const HOLD_LIMIT: u64 = 128 << 10;

#[derive(Debug, Default)]
struct Held {
    bytes: Vec<u8>,
    /// Offset in the output of the first held byte.
    from: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Formatter {
    stdout: Held,
    stderr: Held,
    /// Offset behind the last byte taken.
    taken: u64,
}

impl Formatter {
    /// Takes `data`, which begins at `offset` of the output, and appends the records it completes to `out`. Chunks come
    /// in order of their offsets.
    pub fn push(
        &mut self,
        stream: OutputStream,
        offset: u64,
        data: &[u8],
        stamp: &[u8; WIDTH],
        out: &mut Vec<u8>,
    ) {
        let held = match stream {
            OutputStream::Stderr => &mut self.stderr,
            OutputStream::Stdout | OutputStream::Unspecified => &mut self.stdout,
        };
        let mut rest = data;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end);
            let tail = split(stream, held, line, stamp, out);
            record(stream, b'F', &held.bytes, tail, stamp, out);
            held.bytes.clear();
            rest = &after[1..];
        }
        if !rest.is_empty() {
            let before = held.bytes.len();
            let tail = split(stream, held, rest, stamp, out);
            if held.bytes.is_empty() || before > held.bytes.len() {
                held.from = offset + (data.len() - tail.len()) as u64;
            }
            held.bytes.extend_from_slice(tail);
        }
        self.taken = offset + data.len() as u64;
        self.let_go(stamp, out);
    }

    /// Offset up to which every byte is in records handed out.
    pub fn settled(&self) -> u64 {
        [&self.stdout, &self.stderr]
            .into_iter()
            .filter(|held| !held.bytes.is_empty())
            .map(|held| held.from)
            .fold(self.taken, u64::min)
    }

    /// Both streams have ended: what is held goes out, tagged P.
    pub fn finish(&mut self, stamp: &[u8; WIDTH], out: &mut Vec<u8>) {
        let mut held = [
            (OutputStream::Stdout, std::mem::take(&mut self.stdout)),
            (OutputStream::Stderr, std::mem::take(&mut self.stderr)),
        ];
        held.sort_by_key(|(_, held)| held.from);
        for (stream, held) in held {
            if !held.bytes.is_empty() {
                record(stream, b'P', &held.bytes, &[], stamp, out);
            }
        }
    }

    fn let_go(&mut self, stamp: &[u8; WIDTH], out: &mut Vec<u8>) {
        let taken = self.taken;
        for (stream, held) in [
            (OutputStream::Stdout, &mut self.stdout),
            (OutputStream::Stderr, &mut self.stderr),
        ] {
            if !held.bytes.is_empty() && taken - held.from > HOLD_LIMIT {
                record(stream, b'P', &held.bytes, &[], stamp, out);
                held.bytes.clear();
            }
        }
    }
}

/// Writes full P records of `held` + `line` while they are longer than one record may be; gives what is left of `line`.
/// If it wrote one, `held` is empty after.
fn split<'a>(
    stream: OutputStream,
    held: &mut Held,
    line: &'a [u8],
    stamp: &[u8; WIDTH],
    out: &mut Vec<u8>,
) -> &'a [u8] {
    let mut rest = line;
    while held.bytes.len() + rest.len() > LINE_LIMIT {
        let (part, after) = rest.split_at(LINE_LIMIT - held.bytes.len());
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
    stamp: &[u8; WIDTH],
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
