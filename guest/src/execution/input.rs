//! A process's standard input: chunks with offsets per writer, so that a chunk that is sent again is written once.
//!
//! [`Offsets`] is the bookkeeping, [`Input`] the pipe or terminal behind it.

use crate::descriptor::AsyncDescriptor;
use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, MutexGuard};

/// Writers remembered per process; each attach is one.
const WRITER_LIMIT: usize = 1024;

/// Why a chunk was not taken.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// Bytes before the chunk are missing.
    #[error("input of writer {writer:?} continues at {expected}, the chunk starts at {offset}")]
    Gap {
        writer: String,
        expected: u64,
        offset: u64,
    },
    /// More writers than are remembered.
    #[error("more than {WRITER_LIMIT} writers of one process's input")]
    TooManyWriters,
    /// The process was made without input.
    #[error("the process has no standard input")]
    None,
    /// The pipe or terminal broke.
    #[error("write input")]
    Write(#[source] io::Error),
}

/// How far each writer came.
#[derive(Debug, Default)]
pub struct Offsets {
    accepted: HashMap<String, u64>,
}

impl Offsets {
    /// How much of a chunk of `length` bytes at `offset` was taken before: that many bytes are skipped.
    pub fn skip(&mut self, writer: &str, offset: u64, length: usize) -> Result<usize, InputError> {
        let expected = self.accepted.get(writer).copied().unwrap_or(0);
        if offset > expected {
            return Err(InputError::Gap {
                writer: writer.to_owned(),
                expected,
                offset,
            });
        }
        if !self.accepted.contains_key(writer) {
            if self.accepted.len() >= WRITER_LIMIT {
                return Err(InputError::TooManyWriters);
            }
            self.accepted.insert(writer.to_owned(), 0);
        }
        Ok(usize::try_from(expected - offset)
            .unwrap_or(usize::MAX)
            .min(length))
    }

    /// Notes that `length` more bytes of the writer were taken.
    pub fn advance(&mut self, writer: &str, length: usize) {
        *self.accepted.entry(writer.to_owned()).or_default() += length as u64;
    }

    /// Bytes taken from the writer.
    pub fn accepted(&self, writer: &str) -> u64 {
        self.accepted.get(writer).copied().unwrap_or(0)
    }
}

/// What the bytes go to.
#[derive(Debug)]
enum Sink {
    /// The process was made without.
    None,
    Open(Arc<AsyncDescriptor>),
    /// Closed by an EOF, or nobody reads any more: further bytes are taken and dropped.
    Closed,
}

/// A process's input.
#[derive(Debug)]
pub struct Input {
    offsets: Mutex<Offsets>,
    /// Held while a chunk is written, so that chunks of several writers don't mix.
    sink: tokio::sync::Mutex<Sink>,
    /// A terminal isn't closed by an EOF: the process would be hung up.
    terminal: bool,
    /// Whether an EOF closes it at all (not for a container's init process unless `stdin_once`).
    closes: bool,
}

impl Input {
    /// The input of a process whose descriptor, if any, is `sink`.
    pub fn new(sink: Option<Arc<AsyncDescriptor>>, terminal: bool, closes: bool) -> Self {
        let sink = sink.map_or(Sink::None, Sink::Open);
        Self {
            offsets: Mutex::default(),
            sink: tokio::sync::Mutex::new(sink),
            terminal,
            closes,
        }
    }

    /// Writes what of the chunk is new, waiting while the process doesn't read. Answers the bytes taken from the writer so
    /// far.
    ///
    /// Dropping the future keeps what was written; sending the chunk again continues behind it.
    pub async fn write(
        &self,
        writer: &str,
        offset: u64,
        data: &[u8],
        eof: bool,
    ) -> Result<u64, InputError> {
        let mut sink = self.sink.lock().await;
        let mut rest = &data[self.offsets().skip(writer, offset, data.len())?..];
        while !rest.is_empty() {
            let written = match &*sink {
                Sink::None => return Err(InputError::None),
                Sink::Closed => rest.len(),
                Sink::Open(descriptor) => {
                    match descriptor
                        .write_with(|fd| Ok(rustix::io::write(fd, rest)?))
                        .await
                    {
                        Ok(written) => written,
                        // The other end is gone; what the process doesn't want is no error of the sender's.
                        Err(error)
                            if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EIO)) =>
                        {
                            *sink = Sink::Closed;
                            rest.len()
                        }
                        Err(error) => return Err(InputError::Write(error)),
                    }
                }
            };
            self.offsets().advance(writer, written);
            rest = &rest[written..];
        }
        if eof && self.closes && !self.terminal && matches!(*sink, Sink::Open(_)) {
            *sink = Sink::Closed;
        }
        Ok(self.offsets().accepted(writer))
    }

    /// Drops the descriptor when the process has ended; later input is taken and dropped.
    pub async fn close(&self) {
        let mut sink = self.sink.lock().await;
        if matches!(*sink, Sink::Open(_)) {
            *sink = Sink::Closed;
        }
    }

    fn offsets(&self) -> MutexGuard<'_, Offsets> {
        self.offsets.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A sender that repeats and overlaps chunks at will still has every byte taken once and in order.
        #[test]
        fn every_byte_is_taken_once(cuts in proptest::collection::vec((0u64..300, 0usize..60, 0usize..60), 1..60)) {
            let mut offsets = Offsets::default();
            let mut taken: Vec<u64> = Vec::new();
            for (offset, length, written) in cuts {
                match offsets.skip("w", offset, length) {
                    Ok(skip) => {
                        prop_assert!(skip <= length);
                        // The pipe may take less than what is left.
                        let new = (length - skip).min(written);
                        for index in 0..new {
                            taken.push(offset + (skip + index) as u64);
                        }
                        offsets.advance("w", new);
                    }
                    Err(InputError::Gap { expected, .. }) => prop_assert!(offset > expected),
                    Err(error) => panic!("{error}"),
                }
                prop_assert_eq!(offsets.accepted("w"), taken.len() as u64);
            }
            let in_order: Vec<u64> = (0..taken.len() as u64).collect();
            prop_assert_eq!(taken, in_order);
        }
    }

    #[tokio::test]
    async fn a_repeated_chunk_is_written_once_and_eof_closes() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let sink = Arc::new(AsyncDescriptor::new(writer).unwrap());
        let input = Input::new(Some(sink), false, true);
        assert_eq!(input.write("a", 0, b"hello", false).await.unwrap(), 5);
        assert_eq!(
            input.write("a", 0, b"hello world", false).await.unwrap(),
            11
        );
        assert_eq!(input.write("b", 0, b"!", true).await.unwrap(), 1);
        assert!(matches!(
            input.write("a", 50, b"x", false).await,
            Err(InputError::Gap { expected: 11, .. })
        ));
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::from(reader), &mut text).unwrap();
        assert_eq!(text, "hello world!");
    }

    #[tokio::test]
    async fn input_nobody_reads_is_taken_and_dropped() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        drop(reader);
        let input = Input::new(
            Some(Arc::new(AsyncDescriptor::new(writer).unwrap())),
            false,
            true,
        );
        assert_eq!(input.write("a", 0, b"hello", false).await.unwrap(), 5);
        let none = Input::new(None, false, true);
        assert!(matches!(
            none.write("a", 0, b"x", false).await,
            Err(InputError::None)
        ));
    }
}
