//! [`Server`]: answers FUSE requests for a file system whose root is one regular file with a device's bytes and size.
//! fuse-backend-rs encodes and decodes the messages.
//!
//! Requests come from the host's kernel on behalf of the VM's file server. Their contents are chosen by the guest, which is
//! hostile, so offsets and lengths are checked against the device. Each device has its own thread, so a stalled device blocks
//! only its own users.

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

/// Inode of the file.
const ROOT: u64 = 1;
/// Attribute timeout: size and owner do not change.
const ATTRIBUTE_TIMEOUT: Duration = Duration::from_secs(3600);
/// Maximum size of a message in bytes: a write with its headers.
const MAX_MESSAGE_BYTES: usize = MAX_BUFFER_SIZE as usize + 4096;

fn refused<T>(errno: i32) -> io::Result<T> {
    Err(io::Error::from_raw_os_error(errno))
}

/// A device presented as a file.
#[derive(Debug)]
struct OneFile {
    /// The trait requires interior mutability; only one thread uses it.
    file: Mutex<File>,
    size: u64,
    read_only: bool,
}

impl OneFile {
    fn file(&self) -> MutexGuard<'_, File> {
        self.file.lock()
    }

    /// Reports whether a range lies within the device.
    fn contains(&self, offset: u64, length: u64) -> bool {
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
        let attributes = Attr {
            ino: ROOT,
            size: self.size,
            blocks: self.size / 512,
            mode: libc::S_IFREG | if self.read_only { 0o400 } else { 0o600 },
            nlink: 1,
            blksize: 4096,
            ..Default::default()
        };
        Ok((attributes.into(), ATTRIBUTE_TIMEOUT))
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
        // The device has its own cache; a second one here would miss writes by others.
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
        let remaining = self.size.saturating_sub(offset);
        let count = remaining.min(size.min(MAX_BUFFER_SIZE).into());
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
        if !self.contains(offset, size.into()) {
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

    /// Discards a range if the device can. Other modes are refused: zeroing a range may take arbitrarily long.
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
        if !self.contains(offset, length) {
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

/// A running server. Dropping it ends the thread, its file system and its use of the device after the current request. Drop
/// does not wait, because a stalled device may never answer.
#[derive(Debug)]
pub(crate) struct Server {
    /// Closing it stops the thread.
    _stop: PipeWriter,
}

impl Server {
    /// Starts the thread and returns the mount.
    ///
    /// # Errors
    /// Failed to start the thread or to create the pipe.
    pub(crate) fn start(
        made: Made,
        device: Device,
        read_only: bool,
    ) -> io::Result<(Self, OwnedFd)> {
        let (stopped, stop) = io::pipe()?;
        let file = OneFile {
            size: device.size,
            file: Mutex::new(device.file),
            read_only,
        };
        let fuse = made.device;
        // Not joined: a stalled device may never answer.
        std::thread::Builder::new()
            .name("block device".to_owned())
            .spawn(move || serve(&fuse, &stopped, file))?;
        Ok((Self { _stop: stop }, made.mount))
    }
}

/// Answers requests until either end is closed.
fn serve(fuse: &OwnedFd, stopped: &PipeReader, file: OneFile) {
    let messages = Messages::new(file);
    let (mut request, mut answer) = (vec![0; MAX_MESSAGE_BYTES], vec![0; MAX_MESSAGE_BYTES]);
    while let Some(length) = next_request(fuse, stopped, &mut request) {
        let parts = (
            Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut request[..length])),
            FuseDevWriter::<()>::new(fuse.as_raw_fd(), &mut answer),
        );
        let (Ok(reader), Ok(writer)) = parts else {
            return;
        };
        if let Err(error) = messages.handle_message(reader, Writer::FuseDev(writer), None, None) {
            tracing::debug!(%error, "failed to answer a request to a block device");
        }
    }
}

#[cfg(test)]
mod tests;
