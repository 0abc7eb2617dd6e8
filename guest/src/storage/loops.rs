//! [`Loop`]: a loop device of the VM for a file of the share. Who makes nodes of it for containers is [`super::blocks`].
//!
//! JUSTIFICATION for unsafe: loop devices are set up by ioctl only.

use super::StorageError;
use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// Gives a number that is free.
const CONTROL: &str = "/dev/loop-control";
/// How often a free number may be taken by somebody else (a privileged container) before it is used here.
const TRIES: u32 = 16;
/// The kernel's flags (linux/loop.h): nothing is written; no second cache of the file, whose content others change.
const READ_ONLY: u32 = 1;
const DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Info {
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
pub struct Config {
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

/// A loop device. It goes when this is dropped and no process has it open any more. Nothing here keeps it open: what the
/// kernel has read ahead of it goes with its last user, and the next one sees what the host has written since.
#[derive(Debug)]
pub struct Loop {
    /// Its minor number.
    pub minor: u32,
}

impl Drop for Loop {
    fn drop(&mut self) {
        let Ok(device) = File::open(node(self.minor)) else {
            return;
        };
        // SAFETY: takes no argument and writes no memory. The kernel waits for other users by itself.
        if let Err(errno) = unsafe { ioctl::clear(device.as_raw_fd()) } {
            tracing::warn!(minor = self.minor, %errno, "a loop device stays");
        }
    }
}

fn node(minor: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{minor}"))
}

/// Major number of all of them.
pub const MAJOR: u32 = 7;

/// What is there, by file: containers of a pod that have the same device share one, with one cache.
static LOOPS: Mutex<Option<HashMap<PathBuf, Weak<Loop>>>> = Mutex::new(None);

impl Loop {
    /// The device of `file`, made if there is none. Blocks.
    ///
    /// # Errors
    /// The file cannot be opened, or the kernel refuses.
    pub fn hold(file: &Path, read_only: bool, block_size: u32) -> Result<Arc<Self>, StorageError> {
        let mut loops = LOOPS.lock();
        let loops = loops.get_or_insert_default();
        loops.retain(|_, held| held.strong_count() > 0);
        if let Some(held) = loops.get(file).and_then(Weak::upgrade) {
            return Ok(held);
        }
        let made = Self::make(file, read_only, block_size);
        let made = Arc::new(made.map_err(StorageError::path("make a loop device of", file))?);
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
            // SAFETY: `config` is a whole `struct loop_config`, and the kernel copies it within the call.
            match unsafe { ioctl::configure(device.as_raw_fd(), &config) } {
                Ok(_) => return Ok(Self { minor }),
                Err(nix::Error::EBUSY) if tries < TRIES => tries += 1,
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
    fn as_the_kernel_has_them() {
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(size_of::<Config>(), 304);
        let file = File::open("/dev/null").unwrap();
        let flags = |read_only| config(&file, read_only, 512).info.flags;
        assert_eq!((flags(false), flags(true)), (16, 17));
    }
}
