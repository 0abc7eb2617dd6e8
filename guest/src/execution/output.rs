//! A process's output: a bounded buffer for both streams, read by offset and freed by acknowledgement.
//!
//! [`Buffer`] is the data structure, [`Output`] adds a lock and notifications. The pump fills it directly from pipe
//! or terminal; any number of readers take chunks by offset; acknowledged bytes are freed; when it is full, the pump
//! stops reading and the process blocks in its write. Bytes are not dropped before they are acknowledged;
//! acknowledged bytes are kept for an [`Observer`] while there is room.
//!
//! ```text
//!            base                                   end
//!  freed ─────┤ sealed segments (Bytes, shared) │ tail ├──── next read lands here
//! ```

use boxlite_proto::boxlite::v1::OutputStream;
use boxlite_proto::names::MAX_CHUNK_BYTES;
use boxlite_sys::sync::Mutex;
use bytes::Bytes;
use rustix::buffer::spare_capacity;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, MutexGuard};
use tokio::sync::Notify;

/// Capacity of a buffer in bytes, including its bookkeeping.
const CAPACITY_BYTES: usize = 1 << 20;
/// Charged for every segment in addition to its bytes, so that single-byte writes cannot make the bookkeeping outgrow
/// the data.
const SEGMENT_OVERHEAD_BYTES: usize = 128;
/// Sealed tails below this size are copied: their block is reused, and a segment never pins much more memory than it
/// is charged for.
const COPY_THRESHOLD_BYTES: usize = 24 << 10;
/// A tail with less room than this is sealed before the next read, because short reads cost more than a new block.
const MIN_READ_BYTES: usize = 4 << 10;

/// Consecutive bytes of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Offset of the first byte, counted over both streams.
    pub offset: u64,
    pub stream: OutputStream,
    pub data: Bytes,
}

/// Result of a read at an offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Found {
    Data(Chunk),
    /// No bytes yet.
    Later,
    /// Freed; holds the first offset still available.
    Gone(u64),
    /// The end of the output.
    End,
}

/// The buffer without lock and notifications.
#[derive(Debug)]
pub(crate) struct Buffer {
    base: u64,
    /// Bytes below may be freed; they are kept while observers exist and the space is not needed.
    acked: u64,
    observers: usize,
    sealed: VecDeque<Chunk>,
    /// Sum over `sealed` of length and overhead.
    charged: usize,
    tail: Vec<u8>,
    tail_stream: OutputStream,
    tail_offset: u64,
    closed: bool,
}

impl Default for Buffer {
    fn default() -> Self {
        Self {
            base: 0,
            acked: 0,
            observers: 0,
            sealed: VecDeque::new(),
            charged: 0,
            tail: Vec::new(),
            tail_stream: OutputStream::Stdout,
            tail_offset: 0,
            closed: false,
        }
    }
}

impl Buffer {
    /// Returns the offset after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.tail_offset + self.tail.len() as u64
    }

    /// Returns whether another read fits, after freeing bytes kept only for observers.
    pub(crate) fn has_room(&mut self) -> bool {
        while !self.fits() && self.base < self.acked {
            // One segment at a time, so that observers lose as little as possible.
            let first = self.sealed.front();
            let end = first.map_or(self.acked, |first| first.offset + first.data.len() as u64);
            self.free(end.min(self.acked));
        }
        self.fits()
    }

    fn fits(&self) -> bool {
        self.charged + self.tail.len() + SEGMENT_OVERHEAD_BYTES + MAX_CHUNK_BYTES <= CAPACITY_BYTES
    }

    /// Changes the number of observers.
    pub(crate) fn observed(&mut self, by: isize) {
        self.observers = self.observers.saturating_add_signed(by);
        if self.observers == 0 {
            self.free(self.acked);
        }
    }

    /// Lets `read` append bytes of `stream` to the spare capacity of a vector. Returns their number.
    pub(crate) fn fill(
        &mut self,
        stream: OutputStream,
        read: impl FnOnce(&mut Vec<u8>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let full = self.tail.capacity() - self.tail.len() < MIN_READ_BYTES;
        if !self.tail.is_empty() && (full || self.tail_stream != stream) {
            self.seal();
        }
        if self.tail.is_empty() {
            self.tail_stream = stream;
            if self.tail.capacity() < MIN_READ_BYTES {
                self.tail = Vec::with_capacity(MAX_CHUNK_BYTES);
            }
        }
        read(&mut self.tail)
    }

    /// Turns the tail into a segment, which readers can share.
    fn seal(&mut self) {
        if self.tail.is_empty() {
            return;
        }
        let length = self.tail.len();
        let data = if length < COPY_THRESHOLD_BYTES {
            let copy = Bytes::copy_from_slice(&self.tail);
            self.tail.clear();
            copy
        } else {
            Bytes::from(std::mem::take(&mut self.tail))
        };
        self.sealed.push_back(Chunk {
            offset: self.tail_offset,
            stream: self.tail_stream,
            data,
        });
        self.charged += length + SEGMENT_OVERHEAD_BYTES;
        self.tail_offset += length as u64;
    }

    /// Returns at most [`MAX_CHUNK_BYTES`] bytes of one stream at `offset`.
    pub(crate) fn get(&mut self, offset: u64) -> Found {
        if offset < self.base {
            return Found::Gone(self.base);
        }
        if offset >= self.end() {
            return if self.closed {
                Found::End
            } else {
                Found::Later
            };
        }
        if offset >= self.tail_offset {
            self.seal();
        }
        // The last segment that starts at or before the offset.
        let index = self.sealed.partition_point(|chunk| chunk.offset <= offset) - 1;
        let chunk = &self.sealed[index];
        let skip = (offset - chunk.offset) as usize;
        let length = (chunk.data.len() - skip).min(MAX_CHUNK_BYTES);
        Found::Data(Chunk {
            offset,
            stream: chunk.stream,
            data: chunk.data.slice(skip..skip + length),
        })
    }

    /// Frees everything below `offset`; an offset beyond the end frees everything.
    pub(crate) fn ack(&mut self, offset: u64) {
        self.acked = self.acked.max(offset.min(self.end()));
        if self.observers == 0 {
            self.free(self.acked);
        }
    }

    fn free(&mut self, offset: u64) {
        if offset <= self.base {
            return;
        }
        self.base = offset;
        if offset > self.tail_offset {
            self.seal();
        }
        while let Some(first) = self.sealed.front_mut() {
            let length = first.data.len();
            if first.offset + length as u64 <= offset {
                self.charged -= length + SEGMENT_OVERHEAD_BYTES;
                self.sealed.pop_front();
                continue;
            }
            if first.offset < offset {
                let skip = (offset - first.offset) as usize;
                first.data = first.data.slice(skip..);
                first.offset = offset;
                self.charged -= skip;
            }
            break;
        }
    }

    /// Marks the end of the output and frees spare memory.
    pub(crate) fn close(&mut self) {
        self.seal();
        self.tail = Vec::new();
        self.closed = true;
    }
}

/// A process's output, shared between its pump and its readers.
#[derive(Debug, Default)]
pub(crate) struct Output {
    buffer: Mutex<Buffer>,
    /// Notified on new bytes, the end, and freed ranges.
    changed: Notify,
    /// Notified when bytes were freed.
    room: Notify,
}

/// A reader that never acknowledges. While it exists, bytes acknowledged by others are kept as long as there is room.
#[derive(Debug)]
pub(crate) struct Observer(Arc<Output>);

impl Observer {
    /// Adds an observer of `output`.
    pub(crate) fn of(output: &Arc<Output>) -> Self {
        output.lock().observed(1);
        Self(Arc::clone(output))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.0.lock().observed(-1);
    }
}

/// Result of one attempt to fill the buffer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    Bytes,
    /// The other stream took the room; wait for it again.
    NoRoom,
    End,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock()
    }

    /// Returns the offset after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.lock().end()
    }

    /// Returns whether another read fits.
    pub(crate) fn has_room(&self) -> bool {
        self.lock().has_room()
    }

    /// Reads once from a non-blocking descriptor.
    ///
    /// # Errors
    /// WouldBlock if no bytes are available. A terminal without a process at its other end reads as the end.
    pub(crate) fn fill(&self, stream: OutputStream, source: BorrowedFd<'_>) -> io::Result<Filled> {
        let mut buffer = self.lock();
        if !buffer.has_room() {
            return Ok(Filled::NoRoom);
        }
        let read = buffer.fill(stream, |tail| {
            Ok(rustix::io::read(source, spare_capacity(tail))?)
        });
        drop(buffer);
        match read {
            Ok(0) => Ok(Filled::End),
            Ok(_) => {
                self.changed.notify_waiters();
                Ok(Filled::Bytes)
            }
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Filled::End),
            Err(error) => Err(error),
        }
    }

    /// Waits until another read fits. Cancel-safe.
    pub(crate) async fn wait_for_room(&self) {
        loop {
            let freed = self.room.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if self.has_room() {
                return;
            }
            freed.await;
        }
    }

    /// Returns the bytes at `offset`, waiting for them if needed. Cancel-safe.
    pub(crate) async fn read(&self, offset: u64) -> Found {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.lock().get(offset) {
                Found::Later => {}
                found => return found,
            }
            changed.await;
        }
    }

    /// Waits until a whole chunk is available at `offset`, or the output ends. Cancel-safe.
    pub(crate) async fn fills_chunk(&self, offset: u64) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut buffer = self.lock();
                // Without room the pump waits, so the chunk cannot fill.
                if buffer.closed
                    || !buffer.has_room()
                    || buffer.end() >= offset + MAX_CHUNK_BYTES as u64
                {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Frees everything below `offset`.
    pub(crate) fn ack(&self, offset: u64) {
        self.lock().ack(offset);
        self.room.notify_waiters();
        // A reader waiting below it must learn that its bytes are gone.
        self.changed.notify_waiters();
    }

    /// Marks the end of the output.
    pub(crate) fn close(&self) {
        self.lock().close();
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
