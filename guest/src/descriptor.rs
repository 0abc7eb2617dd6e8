//! [`AsyncDescriptor`]: a pollable descriptor (pipe, terminal, socket) registered with the runtime, on which the
//! caller makes its own system calls.

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A non-blocking descriptor registered with the runtime.
#[derive(Debug)]
pub(crate) struct AsyncDescriptor {
    inner: AsyncFd<OwnedFd>,
}

impl AsyncDescriptor {
    /// Makes the descriptor non-blocking and registers it.
    ///
    /// # Errors
    /// If it cannot be polled (a regular file), or the runtime is out of resources.
    pub(crate) fn new(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&descriptor)?;
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        // SAFETY: the OwnedFd owns its descriptor, and nothing replaces or closes it during the life of the AsyncFd.
        let inner = unsafe { AsyncFd::register(descriptor) }?;
        Ok(Self { inner })
    }

    /// Registers a file of cgroupfs or procfs, which signals changes as "priority"; see [`Self::changed`].
    ///
    /// # Errors
    /// If the runtime is out of resources.
    pub(crate) fn notifying(file: OwnedFd) -> io::Result<Self> {
        // SAFETY: the OwnedFd owns its descriptor, and nothing replaces or closes it during the life of the AsyncFd.
        let inner = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
        Ok(Self { inner })
    }

    /// Waits until the file has changed since it was last read.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        self.inner.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    /// Returns the descriptor for non-blocking calls.
    pub(crate) fn get(&self) -> BorrowedFd<'_> {
        self.inner.get_ref().as_fd()
    }

    /// Runs `call` whenever the descriptor is readable, until it returns something other than EWOULDBLOCK.
    /// Cancel-safe if `call` is.
    pub(crate) async fn read_with<T>(
        &self,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let mut guard = self.inner.readable().await?;
            if let Ok(result) = guard.try_io(|inner| call(inner.get_ref().as_fd())) {
                return result;
            }
        }
    }

    /// Runs `call` whenever the descriptor is writable, like [`Self::read_with`].
    pub(crate) async fn write_with<T>(
        &self,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            let mut guard = self.inner.writable().await?;
            if let Ok(result) = guard.try_io(|inner| call(inner.get_ref().as_fd())) {
                return result;
            }
        }
    }
}
