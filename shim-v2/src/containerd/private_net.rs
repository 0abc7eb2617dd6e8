//! [`PrivateNet`]: an empty network namespace, for a spec that requests a private network without naming a namespace.
//!
//! The shim itself runs in the host's network namespace. The new one is held by a descriptor and ends with the shim.

use crate::error::{Result, ShimError};
use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// An empty network namespace.
#[derive(Debug)]
pub struct PrivateNet(File);

impl PrivateNet {
    /// Creates a namespace on a short-lived thread. Blocks until it is done.
    ///
    /// # Errors
    /// Io with the kernel's error.
    pub fn create() -> Result<Self> {
        let made = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                File::open("/proc/thread-self/ns/net")
            });
            thread
                .join()
                .unwrap_or_else(|_| Err(std::io::Error::other("thread panicked")))
        });
        made.map(Self)
            .map_err(ShimError::io("create", "a network namespace"))
    }

    /// Returns the path of the namespace, valid while this value exists.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.0.as_raw_fd()
        ))
    }
}
