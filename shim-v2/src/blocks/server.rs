//! [`Server`]: answers FUSE requests for a file system that is one regular file, with a device's bytes and size. The messages
//! are read and written by fuse-backend-rs.
//!
//! The requests come from the host's kernel, on behalf of the VM's file server: what they say is the guest's, and hostile, so
//! offsets and lengths are checked against the device here. A thread of its own for each device: one that is stalled stops
//! nothing but what waits for it.

use super::device::Device;
use crate::fuse::{FileSystem as Made, next_request};
use boxlite_sys::sync::Mutex;
use fuse_backend_rs::abi::fuse_abi::{Attr, FsOptions, OpenOptions, SetattrValid, stat64};
use fuse_backend_rs::api::filesystem::{Context, FileSystem, ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::api::server::{MAX_BUFFER_SIZE, Server as Messages};
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use nix::libc;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::MutexGuard;
use std::time::Duration;

/// The one file.
const ROOT: u64 = 1;
/// How long the kernel trusts its size and owner: they do not change.
const TRUST: Duration = Duration::from_secs(3600);
/// Largest message, in bytes: a write with its headers.
const MESSAGE_LIMIT: usize = MAX_BUFFER_SIZE as usize + 4096;

fn refused<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// A device as a file.
#[derive(Debug)]
struct OneFile {
    /// The file server's interface asks for exclusive use; there is one thread.
    file: Mutex<File>,
    size: u64,
    read_only: bool,
}

impl OneFile {
    fn file(&self) -> MutexGuard<'_, File> {
        self.file.lock()
    }

    /// Whether a range is in the device.
    fn has(&self, offset: u64, length: u64) -> bool {
        offset
            .checked_add(length)
            .is_some_and(|end| end <= self.size)
    }
}

impl FileSystem for OneFile {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _: FsOptions) -> io::Result<FsOptions> {
        Ok(FsOptions::BIG_WRITES | FsOptions::MAX_PAGES | FsOptions::ASYNC_READ)
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        if inode != ROOT {
            return refused(libc::ENOENT);
        }
        let facts = Attr {
            ino: ROOT,
            size: self.size,
            blocks: self.size / 512,
            mode: libc::S_IFREG | if self.read_only { 0o400 } else { 0o600 },
            nlink: 1,
            blksize: 4096,
            ..Default::default()
        };
        Ok((facts.into(), TRUST))
    }

    fn setattr(
        &self,
        _: &Context,
        _: u64,
        _: stat64,
        _: Option<u64>,
        _: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        refused(libc::EPERM)
    }

    fn open(
        &self,
        _: &Context,
        _: u64,
        flags: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        if self.read_only && flags & libc::O_ACCMODE.cast_unsigned() != 0 {
            return refused(libc::EROFS);
        }
        // The device has its cache; a second one in the file system would not see what others write.
        Ok((None, OpenOptions::DIRECT_IO, None))
    }

    fn read(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        answer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let left = self.size.saturating_sub(offset);
        let count = left.min(size.min(MAX_BUFFER_SIZE).into());
        match usize::try_from(count) {
            Ok(0) | Err(_) => Ok(0),
            Ok(count) => answer.write_from(&mut *self.file(), count, offset),
        }
    }

    fn write(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        data: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        _: u32,
        _: u32,
    ) -> io::Result<usize> {
        if self.read_only {
            return refused(libc::EROFS);
        }
        if !self.has(offset, size.into()) {
            return refused(libc::ENOSPC);
        }
        data.read_to(&mut *self.file(), size as usize, offset)
    }

    fn flush(&self, _: &Context, _: u64, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn fsync(&self, _: &Context, _: u64, _: bool, _: u64) -> io::Result<()> {
        match self.read_only {
            true => Ok(()),
            false => self.file().sync_data(),
        }
    }

    /// A discard, where the device can. Nothing else: writing zeroes over a range takes as long as it likes.
    fn fallocate(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let discard = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if mode != discard.bits() {
            return refused(libc::EOPNOTSUPP);
        }
        if self.read_only {
            return refused(libc::EROFS);
        }
        if !self.has(offset, length) {
            return refused(libc::ENOSPC);
        }
        Ok(fallocate(&*self.file(), discard, offset, length)?)
    }

    fn release(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        Ok(())
    }
}

/// See the module. Dropping it ends the thread, its file system and its use of the device, once the request in hand is
/// answered; nobody waits for that, since a stalled device may never do.
#[derive(Debug)]
pub struct Server {
    /// Its close stops the thread.
    _stop: PipeWriter,
}

impl Server {
    /// Starts the thread; answers the mount.
    ///
    /// # Errors
    /// No thread, or no pipe.
    pub fn begin(made: Made, device: Device, read_only: bool) -> io::Result<(Self, OwnedFd)> {
        let (stopped, stop) = io::pipe()?;
        let file = OneFile {
            size: device.size,
            file: Mutex::new(device.file),
            read_only,
        };
        let fuse = made.device;
        std::thread::Builder::new()
            .name("block device".to_owned())
            .spawn(move || serve(&fuse, &stopped, file))?;
        Ok((Self { _stop: stop }, made.mount))
    }
}

/// Until either end is closed.
fn serve(fuse: &OwnedFd, stopped: &PipeReader, file: OneFile) {
    let messages = Messages::new(file);
    let (mut request, mut answer) = (vec![0; MESSAGE_LIMIT], vec![0; MESSAGE_LIMIT]);
    while let Some(length) = next_request(fuse, stopped, &mut request) {
        let parts = (
            Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut request[..length])),
            FuseDevWriter::<()>::new(fuse.as_raw_fd(), &mut answer),
        );
        let (Ok(reader), Ok(writer)) = parts else {
            return;
        };
        if let Err(error) = messages.handle_message(reader, Writer::FuseDev(writer), None, None) {
            tracing::debug!(%error, "a request to a block device");
        }
    }
}

#[cfg(test)]
mod tests;
