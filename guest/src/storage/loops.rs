//! [`Loop`]: a loop device of the VM backed by a file of the share. [`super::blocks`] creates its nodes for
//! containers.
//!
//! JUSTIFICATION for unsafe: loop devices can be configured by ioctl only.

use super::StorageError;
use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Device that allocates loop device numbers.
const CONTROL: &str = "/dev/loop-control";
/// Maximum number of attempts; a privileged container may take an allocated number first.
const MAX_ATTEMPTS: u32 = 16;
/// Kernel flags (linux/loop.h): read-only, and direct I/O, which avoids a second cache of a file that others change.
const READ_ONLY: u32 = 1;
const DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
pub(crate) struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

mod ioctl {
    nix::ioctl_none_bad!(get_free, 0x4c82);
    nix::ioctl_none_bad!(clear, 0x4c01);
    nix::ioctl_write_ptr_bad!(configure, 0x4c0a, super::Config);
}

/// A loop device, removed once this is dropped and no process has it open. It is not kept open here, so the kernel
/// drops its cached data with the last user, and the next one sees data that the host has written since.
#[derive(Debug)]
pub(crate) struct Loop {
    /// Minor number.
    pub minor: u32,
}

impl Drop for Loop {
    fn drop(&mut self) {
        let Ok(device) = File::open(node(self.minor)) else {
            return;
        };
        // SAFETY: takes no argument and writes no memory. The kernel defers the removal until other users have closed
        // it.
        if let Err(errno) = unsafe { ioctl::clear(device.as_raw_fd()) } {
            tracing::warn!(minor = self.minor, %errno, "failed to detach loop device");
        }
    }
}

fn node(minor: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{minor}"))
}

/// Major number of loop devices.
pub(crate) const MAJOR: u32 = 7;

/// Loop devices by file: containers of a pod with the same device share one, and its cache.
static LOOPS: Mutex<Option<HashMap<PathBuf, Weak<Loop>>>> = Mutex::new(None);

impl Loop {
    /// Returns the loop device of `file`, creating it on first use. Blocks.
    ///
    /// # Errors
    /// If the file cannot be opened or a system call fails.
    pub(crate) fn hold(
        file: &Path,
        read_only: bool,
        block_size: u32,
    ) -> Result<Arc<Self>, StorageError> {
        let mut loops = LOOPS.lock();
        let loops = loops.get_or_insert_default();
        loops.retain(|_, held| held.strong_count() > 0);
        if let Some(held) = loops.get(file).and_then(Weak::upgrade) {
            return Ok(held);
        }
        let made = Self::make(file, read_only, block_size);
        let made = Arc::new(made.map_err(StorageError::path("create a loop device of", file))?);
        loops.insert(file.to_owned(), Arc::downgrade(&made));
        Ok(made)
    }

    fn make(file: &Path, read_only: bool, block_size: u32) -> io::Result<Self> {
        let open = |path: &Path| OpenOptions::new().read(true).write(!read_only).open(path);
        let backing = open(file)?;
        let control = File::open(CONTROL)?;
        let mut tries = 0;
        loop {
            // SAFETY: takes no argument and writes no memory.
            let minor = unsafe { ioctl::get_free(control.as_raw_fd()) }?;
            let minor = u32::try_from(minor).map_err(io::Error::other)?;
            let device = open(&node(minor))?;
            let config = config(&backing, read_only, block_size);
            // SAFETY: `config` is a complete `struct loop_config`, and the kernel copies it during the call.
            match unsafe { ioctl::configure(device.as_raw_fd(), &config) } {
                Ok(_) => return Ok(Self { minor }),
                Err(nix::Error::EBUSY) if tries < MAX_ATTEMPTS => tries += 1,
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn config(backing: &File, read_only: bool, block_size: u32) -> Config {
    Config {
        fd: backing.as_raw_fd().cast_unsigned(),
        block_size,
        info: Info {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: DIRECT_IO | if read_only { READ_ONLY } else { 0 },
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_size_of_the_kernel() {
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(size_of::<Config>(), 304);
        let file = File::open("/dev/null").unwrap();
        let flags = |read_only| config(&file, read_only, 512).info.flags;
        assert_eq!((flags(false), flags(true)), (16, 17));
    }
}
