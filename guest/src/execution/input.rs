//! A process's standard input: chunks carry offsets per writer, so that a resent chunk is written once.
//!
//! [`Offsets`] does the bookkeeping, [`Input`] writes to the pipe or terminal.

use crate::descriptor::AsyncDescriptor;
use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, MutexGuard};

/// Maximum number of writers remembered per process; each attach is one.
const MAX_WRITERS: usize = 1024;

/// Reasons a chunk was rejected.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// Bytes before the chunk are missing.
    #[error("invalid input offset of writer {writer:?}: expected {expected}, got {offset}")]
    Gap {
        writer: String,
        expected: u64,
        offset: u64,
    },
    /// The maximum number of writers is reached.
    #[error("too many writers to the process's input (maximum {MAX_WRITERS})")]
    TooManyWriters,
    /// The process was created without input.
    #[error("the process has no standard input")]
    None,
    /// Writing to the pipe or terminal failed.
    #[error("failed to write input")]
    Write(#[source] io::Error),
}

/// Number of bytes accepted per writer.
#[derive(Debug, Default)]
pub(crate) struct Offsets {
    accepted: HashMap<String, u64>,
}

impl Offsets {
    /// Returns the number of bytes of a chunk of `length` bytes at `offset` that were accepted before and are to be
    /// skipped.
    pub(crate) fn skip(
        &mut self,
        writer: &str,
        offset: u64,
        length: usize,
    ) -> Result<usize, InputError> {
        let expected = self.accepted.get(writer).copied().unwrap_or(0);
        if offset > expected {
            return Err(InputError::Gap {
                writer: writer.to_owned(),
                expected,
                offset,
            });
        }
        if !self.accepted.contains_key(writer) {
            if self.accepted.len() >= MAX_WRITERS {
                return Err(InputError::TooManyWriters);
            }
            self.accepted.insert(writer.to_owned(), 0);
        }
        Ok(usize::try_from(expected - offset)
            .unwrap_or(usize::MAX)
            .min(length))
    }

    /// Records that `length` more bytes of the writer were accepted.
    pub(crate) fn advance(&mut self, writer: &str, length: usize) {
        *self.accepted.entry(writer.to_owned()).or_default() += length as u64;
    }

    /// Returns the number of bytes accepted from the writer.
    pub(crate) fn accepted(&self, writer: &str) -> u64 {
        self.accepted.get(writer).copied().unwrap_or(0)
    }
}

/// Destination of the input.
#[derive(Debug)]
enum Sink {
    /// The process was created without input.
    None,
    Open(Arc<AsyncDescriptor>),
    /// Closed by an EOF or by the reader; further bytes are discarded.
    Closed,
}

/// A process's input.
#[derive(Debug)]
pub(crate) struct Input {
    offsets: Mutex<Offsets>,
    /// Locked while a chunk is written, so that chunks of several writers do not interleave.
    sink: tokio::sync::Mutex<Sink>,
    /// A terminal is not closed by an EOF, which would hang up the process.
    terminal: bool,
    /// True if an EOF closes the input (not for a container's init process unless `stdin_once`).
    closes: bool,
}

impl Input {
    /// Creates the input of a process whose descriptor, if any, is `sink`.
    pub(crate) fn new(sink: Option<Arc<AsyncDescriptor>>, terminal: bool, closes: bool) -> Self {
        let sink = sink.map_or(Sink::None, Sink::Open);
        Self {
            offsets: Mutex::default(),
            sink: tokio::sync::Mutex::new(sink),
            terminal,
            closes,
        }
    }

    /// Writes the new part of the chunk, waiting while the process does not read. Returns the number of bytes
    /// accepted from the writer so far.
    ///
    /// If the future is dropped, written bytes are recorded; resending the chunk continues after them.
    pub(crate) async fn write(
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
                        // The reader has closed its end, which is not an error of the sender.
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

    /// Closes the descriptor when the process has ended; later input is discarded.
    pub(crate) async fn close(&self) {
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
        /// A sender that repeats and overlaps chunks has every byte written once and in order.
        #[test]
        fn write_any_cuts_writes_each_byte_once(cuts in proptest::collection::vec((0u64..300, 0usize..60, 0usize..60), 1..60)) {
            let mut offsets = Offsets::default();
            let mut taken: Vec<u64> = Vec::new();
            for (offset, length, written) in cuts {
                match offsets.skip("w", offset, length) {
                    Ok(skip) => {
                        prop_assert!(skip <= length);
                        // The pipe may accept only a part.
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
    async fn write_repeated_chunk_once_until_eof() {
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
    async fn write_without_reader_discards_input() {
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
