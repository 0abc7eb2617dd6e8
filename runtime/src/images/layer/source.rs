//! [`Source`]: reads the compressed bytes of a layer, first those of an earlier attempt, then those from the download.
//!
//! Appends downloaded bytes to the partial file and hashes all bytes, which gives the blob's digest at the end. Blocks;
//! used on the conversion's thread.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::download::Piece;
use super::turn::Turn;
use crate::images::error::{ImageError, ImageResult};
use crate::images::reference::Digest;

/// Buffer size for reading the rest of a blob.
const READ_CHUNK_BYTES: usize = 256 << 10;

/// Checks of a conversion between two blocks.
#[derive(Clone)]
pub(super) struct Control {
    pub turn: Turn,
    cancelled: CancellationToken,
}

impl Control {
    /// Returns true if the last caller of the job is gone.
    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }
}

/// Reader of a layer's compressed bytes.
pub(super) struct Source {
    path: PathBuf,
    partial: File,
    /// Remaining bytes of the partial file to replay.
    replay: u64,
    input: mpsc::Receiver<Piece>,
    control: Control,
    chunk: Bytes,
    hash: Sha256,
    bytes: u64,
    state: State,
}

enum State {
    Reading,
    /// The download is complete.
    Ended,
    /// Error of the source, which io::Error cannot carry.
    Failed(ImageError),
}

impl Source {
    /// Opens the partial file and returns the number of bytes that will be replayed. Truncates a file that is too long.
    pub(super) fn open(
        path: &Path,
        size: u64,
        input: mpsc::Receiver<Piece>,
        turn: Turn,
        cancelled: CancellationToken,
    ) -> ImageResult<(Self, u64)> {
        let failed = |e| ImageError::io("open", path, e);
        let mut partial = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        let mut replay = partial.metadata().map_err(failed)?.len();
        if replay > size {
            partial.set_len(0).map_err(failed)?;
            replay = 0;
        }
        partial.seek(SeekFrom::Start(0)).map_err(failed)?;
        let source = Self {
            path: path.to_path_buf(),
            partial,
            replay,
            input,
            control: Control { turn, cancelled },
            chunk: Bytes::new(),
            hash: Sha256::new(),
            bytes: 0,
            state: State::Reading,
        };
        Ok((source, replay))
    }

    pub(super) fn control(&self) -> Control {
        self.control.clone()
    }

    /// Reads the rest of the blob and returns its digest and size.
    pub(super) fn finish(&mut self) -> ImageResult<(Digest, u64)> {
        let mut rest = vec![0; READ_CHUNK_BYTES];
        loop {
            match self.read(&mut rest) {
                Ok(0) => return Ok((Digest::from_hash(self.hash.clone().finalize()), self.bytes)),
                Ok(_) => {}
                Err(e) => {
                    return Err(self
                        .failure()
                        .unwrap_or_else(|| ImageError::io("read", &self.path, e)));
                }
            }
        }
    }

    /// Returns the error of the source, as opposed to an error of the content.
    pub(super) fn failure(&self) -> Option<ImageError> {
        match &self.state {
            State::Failed(error) => Some(error.clone()),
            _ => None,
        }
    }

    fn fail(&mut self, error: ImageError) -> io::Error {
        self.state = State::Failed(error);
        io::Error::other("the layer's source failed")
    }

    fn replay(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer
            .len()
            .min(usize::try_from(self.replay).unwrap_or(usize::MAX));
        match self.partial.read(&mut buffer[..most]) {
            Ok(0) => {
                let error = io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the file was truncated while it was read",
                );
                Err(self.fail(ImageError::io("read", &self.path.clone(), error)))
            }
            Ok(read) => {
                self.replay -= read as u64;
                Ok(read)
            }
            Err(e) => Err(self.fail(ImageError::io("read", &self.path.clone(), e))),
        }
    }

    /// Appends the chunks that have arrived, but were not read, to the partial file for the next pull.
    pub(super) fn keep_rest(&mut self) {
        let mut kept = self.partial.seek(SeekFrom::End(0)).map(drop);
        while let Ok(Piece::Data(chunk)) = self.input.try_recv() {
            kept = kept.and_then(|()| self.partial.write_all(&chunk));
        }
        if let Err(error) = kept {
            tracing::debug!(path = %self.path.display(), %error, "failed to keep downloaded bytes");
        }
    }

    /// Waits for the next chunk and appends it to the partial file. Returns false at the end.
    fn next_chunk(&mut self) -> io::Result<bool> {
        let piece = match self.input.try_recv() {
            Ok(piece) => Some(piece),
            Err(_) => {
                self.control.turn.give_up();
                self.input.blocking_recv()
            }
        };
        self.control.turn.take();
        match piece {
            Some(Piece::Data(chunk)) => {
                if let Err(e) = self.partial.write_all(&chunk) {
                    return Err(self.fail(ImageError::io("write", &self.path.clone(), e)));
                }
                self.chunk = chunk;
                Ok(true)
            }
            Some(Piece::End) => {
                self.state = State::Ended;
                Ok(false)
            }
            None => Err(self.fail(ImageError::Cancelled)),
        }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.state {
            State::Ended => return Ok(0),
            State::Failed(_) => return Err(io::Error::other("the layer's source failed")),
            State::Reading => {}
        }
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.control.is_cancelled() {
            return Err(self.fail(ImageError::Cancelled));
        }
        self.control.turn.take();
        let read = if self.replay > 0 {
            self.replay(buffer)?
        } else {
            while self.chunk.is_empty() {
                if !self.next_chunk()? {
                    return Ok(0);
                }
            }
            let read = self.chunk.len().min(buffer.len());
            buffer[..read].copy_from_slice(&self.chunk.split_to(read));
            read
        };
        self.hash.update(&buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}
