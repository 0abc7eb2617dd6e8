//! [`Mapping`]: registers of a device and pages with known physical addresses, as a driver needs them. With
//! `mapped_file.rs` the only unsafe code of the tests. Runs inside a guest.

use crate::failure::{During, Failure, Result};
use crate::{bail, ensure};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;

/// Bits of an entry of /proc/self/pagemap that are the page frame number, from the kernel's admin-guide/mm/pagemap.
const FRAME_NUMBER: u64 = (1 << 55) - 1;

/// Keeps all pages of this process in memory.
pub(super) fn lock() -> Result {
    // SAFETY: pages move, and their contents remain.
    let locked = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
    ensure!(locked == 0, "mlockall: {}", io::Error::last_os_error());
    Ok(())
}

/// A range of memory of this process.
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

impl Mapping {
    /// Maps the registers at a physical address by /dev/mem. The address may be anywhere in a page.
    pub(super) fn registers(physical: u64, bytes: usize) -> Result<(Self, usize)> {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/mem")
            .during("/dev/mem")?;
        let offset = physical as usize % PAGE;
        let from = libc::off_t::try_from(physical)? - offset as libc::off_t;
        let mapped = Self::map(offset + bytes, libc::MAP_SHARED, file.as_raw_fd(), from)?;
        Ok((mapped, offset))
    }

    /// Maps zeroed pages that remain in memory.
    pub(super) fn pages(count: usize) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_LOCKED | libc::MAP_POPULATE;
        Self::map(count * PAGE, flags, -1, 0)
    }

    fn map(bytes: usize, flags: i32, fd: i32, from: libc::off_t) -> Result<Self> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps no memory of this program.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, fd, from) };
        ensure!(
            start != libc::MAP_FAILED,
            "mmap: {}",
            io::Error::last_os_error()
        );
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Self { start, bytes }),
            None => bail!("mapped at 0"),
        }
    }

    /// Returns the physical addresses of the pages. Needs CAP_SYS_ADMIN.
    pub(super) fn physical(&self) -> Result<Vec<u64>> {
        let table = File::open("/proc/self/pagemap")?;
        let first = self.start.as_ptr() as usize / PAGE;
        let address = |page: usize| {
            let mut entry = [0; 8];
            table.read_exact_at(&mut entry, (page * 8) as u64)?;
            let frame = u64::from_ne_bytes(entry) & FRAME_NUMBER;
            ensure!(frame != 0, "no frame number: needs CAP_SYS_ADMIN");
            Ok::<_, Failure>(frame * PAGE as u64)
        };
        (first..first + self.bytes / PAGE).map(address).collect()
    }

    /// Returns the 32-bit value at an aligned offset.
    pub(super) fn read_u32(&self, at: usize) -> u32 {
        // SAFETY: `word` checks bounds and alignment. The device may change the value at any time, hence volatile.
        unsafe { self.word(at).read_volatile() }
    }

    /// Stores a 32-bit value at an aligned offset.
    pub(super) fn write_u32(&self, at: usize, value: u32) {
        // SAFETY: as in `read_u32`; no reference to the mapping exists.
        unsafe { self.word(at).write_volatile(value) };
    }

    fn word(&self, at: usize) -> *mut u32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.bytes);
        // SAFETY: the result is in the mapping, which exists as long as `self`.
        unsafe { self.start.add(at) }.as_ptr().cast()
    }

    /// Stores bytes at an offset.
    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes);
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: the byte is in the mapping, and no reference to it exists.
            unsafe { self.start.add(at + index).write_volatile(*byte) };
        }
    }

    /// Returns bytes from an offset on.
    pub(super) fn read(&self, at: usize, bytes: usize) -> Vec<u8> {
        assert!(at + bytes <= self.bytes);
        // SAFETY: the bytes are in the mapping. The device may change them at any time, hence volatile.
        let byte = |index| unsafe { self.start.add(at + index).read_volatile() };
        (0..bytes).map(byte).collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is that of the mapping, to which no reference exists.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}
