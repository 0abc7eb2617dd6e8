//! Attributes of detached mounts: mount_setattr(2), which has no safe form in the crates used here. Needs Linux 5.12.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Read-only mount (linux/mount.h).
pub const MOUNT_ATTR_RDONLY: u64 = 0x1;
/// Ignores set-user-id bits and file capabilities.
pub const MOUNT_ATTR_NOSUID: u64 = 0x2;
/// Refuses to open device nodes.
pub const MOUNT_ATTR_NODEV: u64 = 0x4;
/// Maps file owners by a user namespace.
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr` of the kernel (linux/mount.h).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Sets flags of a mount, with `recursive` of all mounts below it. Other flags are unchanged.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set_flags(mount: impl AsFd, flags: u64, recursive: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        set: flags,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    set(mount.as_fd(), &attributes, recursive)
}

/// Maps file owners of a detached mount, with `recursive` of all mounts below it, by `user_namespace`.
///
/// # Errors
/// Those of mount_setattr(2); EINVAL if a file system does not support ID-mapped mounts.
pub fn set_user_namespace(
    mount: impl AsFd,
    user_namespace: BorrowedFd<'_>,
    recursive: bool,
) -> io::Result<()> {
    let attributes = MountAttributes {
        set: MOUNT_ATTR_IDMAP,
        clear: 0,
        propagation: 0,
        user_namespace: user_namespace.as_raw_fd() as u64,
    };
    set(mount.as_fd(), &attributes, recursive)
}

fn set(mount: BorrowedFd<'_>, attributes: &MountAttributes, recursive: bool) -> io::Result<()> {
    let scope = if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a NUL-terminated literal, the attributes are live and their size is the one given; the kernel
    // only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | scope,
            std::ptr::from_ref(attributes),
            size_of::<MountAttributes>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
