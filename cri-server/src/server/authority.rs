//! `Sanitizer`: a filter on a connection's bytes that makes the `:authority` of grpc-go's unix-socket clients valid.
//!
//! grpc-go sends the percent-encoded socket path (`%2Frun%2Fboxlite%2Fcri.sock`) or the path itself. The h2 crate accepts
//! neither as an authority and resets the stream before the services see it. The bytes are therefore changed before h2
//! reads them: in every header block, `%` and `/` of an `:authority` literal become `-`. All three have six-bit codes in
//! HPACK's Huffman table (RFC 7541, appendix B), so all lengths remain the same, on the wire and in the dynamic tables of
//! client and server.
//!
//! Everything else passes unchanged. The filter keeps no payload, and from the first byte that it does not understand it
//! passes everything on, so that h2 reports the error. Header blocks above `MAX_BLOCK_BYTES` are not inspected.
//!
//! Flow: connection → `Sanitizer::feed` on each read, before h2.

/// The client's connection preface, RFC 9113 §3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Size of a frame's header in bytes.
const FRAME_HEADER: usize = 9;
const TYPE_HEADERS: u8 = 1;
const FLAG_PADDED: u8 = 0x8;
const FLAG_PRIORITY: u8 = 0x20;
/// Maximum size of a HEADERS frame that is held back for inspection, in bytes. gRPC's have a few hundred; h2 accepts
/// 16 KiB by default and rejects larger ones.
const MAX_BLOCK_BYTES: usize = 16 << 10;
/// Index of `:authority` in HPACK's static table.
const AUTHORITY: usize = 1;

/// Next element expected in the byte stream.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// The preface, after this many of its bytes.
    Preface(usize),
    /// A frame's header.
    Header,
    /// Payload of a HEADERS frame: length in bytes, and flags.
    Block { length: usize, flags: u8 },
    /// This many bytes of another frame.
    Skip(usize),
    /// Invalid data: everything passes.
    Blind,
}

/// Rewrites the bytes of one connection from client to server.
#[derive(Debug)]
pub(crate) struct Sanitizer {
    state: State,
    held: Vec<u8>,
}

impl Default for Sanitizer {
    fn default() -> Self {
        Self {
            state: State::Preface(0),
            held: Vec::new(),
        }
    }
}

impl Sanitizer {
    /// Consumes bytes that were read, and appends those that may be passed on to `out`. Holds back at most a frame header
    /// and one header block of [`MAX_BLOCK_BYTES`].
    pub(crate) fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) {
        while !input.is_empty() {
            let used = match self.state {
                State::Blind => {
                    out.extend_from_slice(input);
                    input.len()
                }
                State::Preface(seen) => self.preface(seen, input, out),
                State::Skip(left) => {
                    let used = left.min(input.len());
                    out.extend_from_slice(&input[..used]);
                    self.state = if used == left {
                        State::Header
                    } else {
                        State::Skip(left - used)
                    };
                    used
                }
                State::Header => self.header(input, out),
                State::Block { length, flags } => self.block(length, flags, input, out),
            };
            input = &input[used..];
        }
    }

    fn preface(&mut self, seen: usize, input: &[u8], out: &mut Vec<u8>) -> usize {
        let used = (PREFACE.len() - seen).min(input.len());
        let expected = &PREFACE[seen..seen + used];
        out.extend_from_slice(&input[..used]);
        self.state = if input[..used] != *expected {
            State::Blind
        } else if seen + used == PREFACE.len() {
            State::Header
        } else {
            State::Preface(seen + used)
        };
        used
    }

    fn header(&mut self, input: &[u8], out: &mut Vec<u8>) -> usize {
        let used = (FRAME_HEADER - self.held.len()).min(input.len());
        self.held.extend_from_slice(&input[..used]);
        if self.held.len() == FRAME_HEADER {
            let length = u32::from_be_bytes([0, self.held[0], self.held[1], self.held[2]]) as usize;
            let (kind, flags) = (self.held[3], self.held[4]);
            out.append(&mut self.held);
            self.state = match (kind, length) {
                (_, 0) => State::Header,
                (TYPE_HEADERS, 1..=MAX_BLOCK_BYTES) => State::Block { length, flags },
                _ => State::Skip(length),
            };
        }
        used
    }

    fn block(&mut self, length: usize, flags: u8, input: &[u8], out: &mut Vec<u8>) -> usize {
        let used = (length - self.held.len()).min(input.len());
        self.held.extend_from_slice(&input[..used]);
        if self.held.len() == length {
            let from =
                usize::from(flags & FLAG_PADDED != 0) + 5 * usize::from(flags & FLAG_PRIORITY != 0);
            if let Some(block) = self.held.get_mut(from..) {
                rewrite(block);
            }
            out.append(&mut self.held);
            self.state = State::Header;
        }
        used
    }
}

/// Parses the representations of a header block (RFC 7541 §6) and changes `:authority` literals. Returns `None` at its end,
/// or at the first invalid byte (padding, a truncated block).
fn rewrite(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    loop {
        let first = *block.get(at)?;
        let prefix = match first {
            0x80.. => {
                integer(block, &mut at, 7)?;
                continue;
            }
            0x40.. => 6,
            0x20.. => {
                integer(block, &mut at, 5)?;
                continue;
            }
            _ => 4,
        };
        let name = integer(block, &mut at, prefix)?;
        if name == 0 {
            string(block, &mut at)?;
        }
        let (value, huffman) = string(block, &mut at)?;
        if name == AUTHORITY {
            let value = block.get_mut(value)?;
            if huffman {
                rewrite_huffman(value);
            } else {
                rewrite_plain(value);
            }
        }
    }
}

/// Parses an integer with `bits` prefix bits (RFC 7541 §5.1), at most 2^21.
fn integer(block: &[u8], at: &mut usize, bits: u32) -> Option<usize> {
    let mask = (1_usize << bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & mask;
    *at += 1;
    if value < mask {
        return Some(value);
    }
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Parses a string (RFC 7541 §5.2): its position, and a flag for Huffman coding.
fn string(block: &[u8], at: &mut usize) -> Option<(std::ops::Range<usize>, bool)> {
    let huffman = *block.get(*at)? & 0x80 != 0;
    let length = integer(block, at, 7)?;
    let range = *at..at.checked_add(length)?;
    block.get(range.clone())?;
    *at = range.end;
    Some((range, huffman))
}

fn rewrite_plain(value: &mut [u8]) {
    for byte in value {
        if matches!(byte, b'%' | b'/') {
            *byte = b'-';
        }
    }
}

/// Code of `-`, six bits.
const DASH: u32 = 0x16;
/// Codes of `%` and `/`, six bits each.
const REPLACED: [u32; 2] = [0x15, 0x18];
/// Letters, digits and the punctuation of a path, by length of their code: (bits, least code, most code). The code is
/// canonical, so each length is one range. Codes of 9 and more bits are characters that no authority contains.
const CODES: [(usize, u32, u32); 4] = [
    (5, 0x0, 0x9),
    (6, 0x14, 0x2d),
    (7, 0x5c, 0x7b),
    (8, 0xf8, 0xfd),
];

/// Changes the codes in place, and stops at the first code of more than eight bits (the padding is one).
fn rewrite_huffman(value: &mut [u8]) {
    let bits = value.len() * 8;
    let mut at = 0;
    'symbols: while at < bits {
        for (length, least, most) in CODES {
            if at + length > bits {
                return;
            }
            let code = peek(value, at, length);
            if (least..=most).contains(&code) {
                if length == 6 && REPLACED.contains(&code) {
                    poke(value, at, 6, DASH);
                }
                at += length;
                continue 'symbols;
            }
        }
        return;
    }
}

fn peek(value: &[u8], at: usize, length: usize) -> u32 {
    (at..at + length).fold(0, |code, bit| {
        code << 1 | u32::from(value[bit / 8] >> (7 - bit % 8) & 1)
    })
}

fn poke(value: &mut [u8], at: usize, length: usize, code: u32) {
    for i in 0..length {
        let bit = at + i;
        let mask = 1 << (7 - bit % 8);
        if code >> (length - 1 - i) & 1 == 1 {
            value[bit / 8] |= mask;
        } else {
            value[bit / 8] &= !mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        bytes.extend([kind, flags, 0, 0, 0, 1]);
        bytes.extend(payload);
        bytes
    }

    fn pass(chunks: &[&[u8]]) -> Vec<u8> {
        let mut sanitizer = Sanitizer::default();
        let mut out = Vec::new();
        for chunk in chunks {
            sanitizer.feed(chunk, &mut out);
        }
        out
    }

    fn plain_block(authority: &[u8]) -> Vec<u8> {
        // :method POST indexed, :authority literal with indexing, another header with a path in it.
        let mut block = vec![0x83, 0x41, authority.len() as u8];
        block.extend(authority);
        block.extend([0x40, 1, b'x', 3, b'/', b'%', b'a']);
        block
    }

    #[test]
    fn plain_literal_alone_is_changed() {
        let stream = [
            PREFACE.to_vec(),
            frame(4, 0, &[]),
            frame(1, 4, &plain_block(b"%2Frun%2Fx")),
        ]
        .concat();
        let expected = [
            PREFACE.to_vec(),
            frame(4, 0, &[]),
            frame(1, 4, &plain_block(b"-2Frun-2Fx")),
        ]
        .concat();
        assert_eq!(pass(&[&stream]), expected);
    }

    #[test]
    fn huffman_literal_is_changed() {
        // "%2F/" by RFC 7541 appendix B: % 010101, 2 00010, F 1100011, / 011000, padding 1s.
        let bits = "010101000101100011011000";
        let coded: Vec<u8> = bits
            .as_bytes()
            .chunks(8)
            .map(|c| u8::from_str_radix(std::str::from_utf8(c).unwrap(), 2).unwrap())
            .collect();
        let mut changed = coded.clone();
        rewrite_huffman(&mut changed);
        let got: String = changed.iter().map(|b| format!("{b:08b}")).collect();
        assert_eq!(got, "010110000101100011010110");
    }

    #[test]
    fn padding_and_priority_are_skipped() {
        let mut payload = vec![2, 0, 0, 0, 0, 16];
        payload.extend(plain_block(b"/a"));
        payload.extend([0, 0]);
        let stream = [PREFACE.to_vec(), frame(1, 4 | 8 | 0x20, &payload)].concat();
        let out = pass(&[&stream]);
        assert!(out.windows(2).any(|w| w == b"-a"));
        assert_eq!(out.len(), stream.len());
    }

    #[test]
    fn other_protocols_pass_unchanged() {
        let text = b"GET / HTTP/1.1\r\nHost: a%b\r\n\r\n";
        assert_eq!(pass(&[text]), text);
    }

    proptest! {
        #[test]
        fn any_bytes_keep_their_length_and_cutting_does_not_matter(
            payloads in prop::collection::vec((0_u8..10, any::<u8>(), prop::collection::vec(any::<u8>(), 0..64)), 0..6),
            cut in 1_usize..20,
        ) {
            let mut stream = PREFACE.to_vec();
            for (kind, flags, payload) in &payloads {
                stream.extend(frame(*kind, *flags, payload));
            }
            let whole = pass(&[&stream]);
            let pieces: Vec<&[u8]> = stream.chunks(cut).collect();
            prop_assert_eq!(whole.len(), stream.len());
            prop_assert_eq!(whole, pass(&pieces));
        }
    }
}
