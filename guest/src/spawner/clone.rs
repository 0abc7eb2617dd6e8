//! [`clone_child`]: clones the calling process.
//!
//! JUSTIFICATION of the unsafe code here: cloning with CLONE_PARENT has no safe form.

use std::io;

/// Parent of the cloned process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parent {
    /// The caller.
    Caller,
    /// The caller's parent: the clone becomes a sibling.
    Grand,
}

/// Clones the calling process like fork(2). Returns `None` in the child.
///
/// The caller must be single-threaded. The child may use all of std, because no lock can be held by another thread.
pub(crate) fn clone_child(parent: Parent) -> io::Result<Option<i32>> {
    let flags = match parent {
        Parent::Caller => libc::SIGCHLD,
        // With CLONE_PARENT the exit signal is the caller's own.
        Parent::Grand => libc::CLONE_PARENT,
    };
    // SAFETY: a clone without CLONE_VM and without a new stack behaves like fork; the caller is single-threaded (see
    // above), so the copied address space is consistent.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
    match pid {
        0 => Ok(None),
        pid if pid > 0 => Ok(Some(pid as i32)),
        _ => Err(io::Error::last_os_error()),
    }
}
