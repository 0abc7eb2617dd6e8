//! Raw FUSE messages as a byte stream between the host's kernel and the guest's file server, split by [`Frames`].
//!
//! Every message starts with its length (u32, in the byte order of both). The content is not interpreted here.

/// Maximum data of one write: the host kernel's default limit.
pub const MAX_WRITE_BYTES: u32 = 128 << 10;
/// Maximum message size in bytes: a write or the answer to a read, with all headers.
pub const MAX_MESSAGE_BYTES: usize = MAX_WRITE_BYTES as usize + (8 << 10);
/// Minimum message size in bytes: the header of an answer.
pub const HEADER: usize = 16;

/// An invalid message length; the stream is unusable afterwards.
#[derive(Debug, thiserror::Error)]
#[error("FUSE message of {length} bytes: not within {HEADER} and {MAX_MESSAGE_BYTES}")]
pub struct FrameError {
    length: usize,
}

/// Buffer from which messages are cut.
#[derive(Debug, Default)]
pub struct Frames(Vec<u8>);

impl Frames {
    /// Adds received bytes.
    pub fn push(&mut self, data: &[u8]) {
        self.0.extend_from_slice(data);
    }

    /// Returns the next complete message, or `None` if more bytes are needed.
    ///
    /// # Errors
    /// A length outside the limits.
    pub fn cut(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let Some(length) = self.0.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_ne_bytes(*length) as usize;
        if !(HEADER..=MAX_MESSAGE_BYTES).contains(&length) {
            return Err(FrameError { length });
        }
        if self.0.len() < length {
            return Ok(None);
        }
        let rest = self.0.split_off(length);
        Ok(Some(std::mem::replace(&mut self.0, rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, fill: u8) -> Vec<u8> {
        let mut message = length.to_ne_bytes().to_vec();
        message.resize(length as usize, fill);
        message
    }

    #[test]
    fn messages_come_whole_however_they_were_cut() {
        let sent = [message(16, 1), message(5000, 2), message(40, 3)];
        let stream = sent.concat();
        for size in [1, 7, 100, 6000] {
            let mut frames = Frames::default();
            let mut got = Vec::new();
            for piece in stream.chunks(size) {
                frames.push(piece);
                while let Some(message) = frames.cut().expect("a good length") {
                    got.push(message);
                }
            }
            assert_eq!(got, sent, "in pieces of {size}");
        }
    }

    #[test]
    fn lengths_are_bounded() {
        for length in [0_u32, 15, MAX_MESSAGE_BYTES as u32 + 1, u32::MAX] {
            let mut frames = Frames::default();
            frames.push(&length.to_ne_bytes());
            assert!(frames.cut().is_err(), "{length}");
        }
    }

    #[test]
    fn fuzz_stream_is_cut_or_rejected() {
        let seed = [message(40, 1), message(100, 2)].concat();
        boxlite_fuzz::Fuzz::new("fuse").seed(seed).run(|input| {
            let mut frames = Frames::default();
            for part in input.chunks(17) {
                frames.push(part);
                while let Ok(Some(message)) = frames.cut() {
                    assert!((HEADER..=MAX_MESSAGE_BYTES).contains(&message.len()));
                }
            }
        });
    }
}
