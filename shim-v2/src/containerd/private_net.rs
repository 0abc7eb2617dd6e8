//! [`PrivateNet`]: a network namespace with nothing in it, for a VM whose spec asks for one of its own and names none.
//!
//! The shim must not lend its own: that is the host's. Held by a descriptor, so it ends with the shim and leaves nothing.

use crate::error::{Result, ShimError};
use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// See the module.
#[derive(Debug)]
pub struct PrivateNet(File);

impl PrivateNet {
    /// Makes one, on a thread that then ends. Blocks for a moment.
    ///
    /// # Errors
    /// Io where the kernel refuses.
    pub fn create() -> Result<Self> {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        });
        let made = thread
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread died")));
        made.map(Self)
            .map_err(ShimError::io("make", "a network namespace"))
    }

    /// Its path, as long as this lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.0.as_raw_fd()
        ))
    }
}
