//! [`MappedFile`]: a file mapped into memory, for the probes of docs/coherence.md. The only unsafe code of the tests.

use crate::failure::{Failure, Result};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;

/// A shared, writable mapping of the first bytes of a file.
pub(crate) struct MappedFile<const BYTES: usize>(NonNull<u8>);

impl<const BYTES: usize> MappedFile<BYTES> {
    /// Maps a file that has at least this size.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        // SAFETY: a new mapping at an address of the kernel's choice overlaps no memory of this program.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), BYTES, access, libc::MAP_SHARED, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let address = NonNull::new(address.cast());
        Ok(Self(address.ok_or_else(|| {
            Failure(format!("{} is mapped at 0", path.display()))
        })?))
    }

    /// Returns a byte.
    pub(crate) fn read(&self, at: usize) -> u8 {
        assert!(at < BYTES);
        // SAFETY: the byte is in the mapping, which exists as long as `self`. Others may change it at any time, hence volatile.
        unsafe { self.0.add(at).read_volatile() }
    }

    /// Changes a byte.
    pub(crate) fn write(&mut self, at: usize, byte: u8) {
        assert!(at < BYTES);
        // SAFETY: as in `read`; no reference to the mapping exists.
        unsafe { self.0.add(at).write_volatile(byte) };
    }

    /// Writes the changes to the file (msync).
    pub(crate) fn sync(&self) -> Result {
        // SAFETY: the range is that of the mapping, and msync changes no memory.
        match unsafe { libc::msync(self.0.as_ptr().cast(), BYTES, libc::MS_SYNC) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().into()),
        }
    }
}

impl<const BYTES: usize> Drop for MappedFile<BYTES> {
    fn drop(&mut self) {
        // SAFETY: the range is that of the mapping, to which no reference exists.
        unsafe { libc::munmap(self.0.as_ptr().cast(), BYTES) };
    }
}
