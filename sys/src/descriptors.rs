//! Inherited file descriptors.

use std::io;

/// First descriptor after the standard streams.
const FIRST: libc::c_uint = 3;

/// Closes every descriptor except the standard streams. Only for the beginning of `main`, before the process has opened
/// anything: descriptors that a parent passed on by mistake must not reach a process that handles hostile input.
///
/// # Errors
/// Those of close_range(2): ENOSYS before Linux 5.9.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: by the function's contract no object of this process owns a descriptor beyond the standard streams.
    let result = unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, 0) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
