//! A process's output: one bounded buffer for both streams, read by offset, freed by acknowledgement.
//!
//! [`Buffer`] is the plain data structure, [`Output`] the same behind a lock with wake-ups. The pump fills it straight
//! from pipe or terminal; any number of readers take chunks by offset; what is acknowledged is freed; when it is full
//! the pump stops reading and the process blocks in its write. Nothing is ever dropped before it is acknowledged; what is
//! acknowledged stays for an [`Observer`] as long as there is room.
//!
//! ```text
//!            base                                   end
//!  freed ─────┤ sealed segments (Bytes, shared) │ tail ├──── next read lands here
//! ```

use boxlite_proto::boxlite::v1::OutputStream;
use boxlite_proto::names::CHUNK_LIMIT;
use boxlite_sys::sync::Mutex;
use bytes::Bytes;
use rustix::buffer::spare_capacity;
use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, MutexGuard};
use tokio::sync::Notify;

/// What a buffer may hold, in bytes, its bookkeeping included.
const CAPACITY: usize = 1 << 20;
/// Charged for every segment beside its bytes, so that single-byte writes can't make the bookkeeping outgrow the data.
const SEGMENT_OVERHEAD: usize = 128;
/// Sealed tails below this size are copied: the block they were read into is used on, and a segment never pins much more
/// memory than it is charged for.
const COPY_BELOW: usize = 24 << 10;
/// A tail with less room than this is sealed before the next read: short reads cost more than a new block.
const READ_MINIMUM: usize = 4 << 10;

/// Bytes of one stream in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// Of its first byte, over both streams.
    pub offset: u64,
    pub stream: OutputStream,
    pub data: Bytes,
}

/// What a reader finds at an offset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    Data(Chunk),
    /// Nothing yet.
    Later,
    /// Freed; the first offset still there.
    Gone(u64),
    /// Nothing, and nothing will come.
    End,
}

/// The buffer without lock and wake-ups.
#[derive(Debug)]
pub struct Buffer {
    base: u64,
    /// Below it everything may be freed; it is, unless observers are there and nobody needs the room.
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
    /// Offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.tail_offset + self.tail.len() as u64
    }

    /// Whether another read fits, once what only observers may still want is freed.
    pub fn has_room(&mut self) -> bool {
        while !self.fits() && self.base < self.acked {
            // A segment at a time: an observer loses no more than must be.
            let first = self.sealed.front();
            let end = first.map_or(self.acked, |first| first.offset + first.data.len() as u64);
            self.free(end.min(self.acked));
        }
        self.fits()
    }

    fn fits(&self) -> bool {
        self.charged + self.tail.len() + SEGMENT_OVERHEAD + CHUNK_LIMIT <= CAPACITY
    }

    /// One observer more or less.
    pub fn observed(&mut self, by: isize) {
        self.observers = self.observers.saturating_add_signed(by);
        if self.observers == 0 {
            self.free(self.acked);
        }
    }

    /// Lets `read` put bytes of `stream` into the spare room of the vector it is given. Answers how many came.
    pub fn fill(
        &mut self,
        stream: OutputStream,
        read: impl FnOnce(&mut Vec<u8>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let full = self.tail.capacity() - self.tail.len() < READ_MINIMUM;
        if !self.tail.is_empty() && (full || self.tail_stream != stream) {
            self.seal();
        }
        if self.tail.is_empty() {
            self.tail_stream = stream;
            if self.tail.capacity() < READ_MINIMUM {
                self.tail = Vec::with_capacity(CHUNK_LIMIT);
            }
        }
        read(&mut self.tail)
    }

    /// Makes the tail a segment, which readers can share.
    fn seal(&mut self) {
        if self.tail.is_empty() {
            return;
        }
        let length = self.tail.len();
        let data = if length < COPY_BELOW {
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
        self.charged += length + SEGMENT_OVERHEAD;
        self.tail_offset += length as u64;
    }

    /// What is at `offset`: at most [`CHUNK_LIMIT`] bytes of one stream.
    pub fn get(&mut self, offset: u64) -> Found {
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
        let length = (chunk.data.len() - skip).min(CHUNK_LIMIT);
        Found::Data(Chunk {
            offset,
            stream: chunk.stream,
            data: chunk.data.slice(skip..skip + length),
        })
    }

    /// Everything below `offset` may go; an offset beyond the end means everything.
    pub fn ack(&mut self, offset: u64) {
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
                self.charged -= length + SEGMENT_OVERHEAD;
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

    /// No more bytes will come. Gives the spare memory back.
    pub fn close(&mut self) {
        self.seal();
        self.tail = Vec::new();
        self.closed = true;
    }
}

/// A process's output, shared between its pump and its readers.
#[derive(Debug, Default)]
pub struct Output {
    buffer: Mutex<Buffer>,
    /// More bytes, or the end, or a freed range.
    changed: Notify,
    /// Bytes were freed.
    room: Notify,
}

/// A reader that never acknowledges: while it is there, what others have acknowledged stays as long as there is room for
/// it.
#[derive(Debug)]
pub struct Observer(Arc<Output>);

impl Observer {
    /// One more of `output`.
    pub fn of(output: &Arc<Output>) -> Self {
        output.lock().observed(1);
        Self(Arc::clone(output))
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.0.lock().observed(-1);
    }
}

/// What came of one attempt to fill the buffer.
#[derive(Debug, PartialEq, Eq)]
pub enum Filled {
    Bytes,
    /// The other stream took the room; wait for it again.
    NoRoom,
    End,
}

impl Output {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock()
    }

    /// Offset behind the last byte.
    pub fn end(&self) -> u64 {
        self.lock().end()
    }

    /// Whether another read fits.
    pub fn has_room(&self) -> bool {
        self.lock().has_room()
    }

    /// Reads once from a non-blocking descriptor.
    ///
    /// # Errors
    /// WouldBlock where nothing is there. A terminal without a process at its other end reads as the end.
    pub fn fill(&self, stream: OutputStream, source: BorrowedFd<'_>) -> io::Result<Filled> {
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

    /// Waits until another read fits. Safe to drop.
    pub async fn wait_for_room(&self) {
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

    /// What is at `offset`, waiting for it where nothing is there yet. Safe to drop.
    pub async fn read(&self, offset: u64) -> Found {
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

    /// Waits until a whole chunk is there behind `offset`, or no more will come. Safe to drop.
    pub async fn fills_chunk(&self, offset: u64) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut buffer = self.lock();
                // Where there is no room the pump waits, and so would this.
                if buffer.closed
                    || !buffer.has_room()
                    || buffer.end() >= offset + CHUNK_LIMIT as u64
                {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Frees everything below `offset`.
    pub fn ack(&self, offset: u64) {
        self.lock().ack(offset);
        self.room.notify_waiters();
        // A reader that waits below it must learn that its bytes are gone.
        self.changed.notify_waiters();
    }

    /// No more bytes will come.
    pub fn close(&self) {
        self.lock().close();
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
