//! FUSE file systems served by this process, created without a mount point. The host's kernel checks permissions by owner
//! and mode.
//!
//! Users: [`crate::mount_export`] (directories of the guest, for the host) and [`crate::blocks`] (block devices of the host,
//! for the guest).

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Subtype of the mounts: their type in mount tables is "fuse.boxlite".
pub const SUBTYPE: &str = "boxlite";
/// FUSE device.
const DEVICE: &str = "/dev/fuse";

/// File type of a file system's root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    Directory,
    File,
}

/// A detached file system.
#[derive(Debug)]
pub struct FileSystem {
    /// FUSE device, non-blocking; closing the last descriptor ends the file system.
    pub device: OwnedFd,
    /// Descriptor of the detached mount.
    pub mount: OwnedFd,
}

/// Creates a file system. `source` is its name in mount tables.
///
/// # Errors
/// The failed step.
pub fn file_system(source: &str, root: Root, read_only: bool) -> io::Result<FileSystem> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = open(DEVICE, flags, Mode::empty()).map_err(named("open /dev/fuse"))?;
    let mount = make(&device, source, root, read_only).map_err(named("create FUSE file system"))?;
    Ok(FileSystem { device, mount })
}

fn make(
    device: &OwnedFd,
    source: &str,
    root: Root,
    read_only: bool,
) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(context.as_fd(), "source", source)?;
    fsconfig_set_string(context.as_fd(), "subtype", SUBTYPE)?;
    let number = device.as_raw_fd().to_string();
    let mode = match root {
        Root::Directory => "40000",
        Root::File => "100600",
    };
    for (key, value) in [
        ("fd", number.as_str()),
        ("rootmode", mode),
        ("user_id", "0"),
        ("group_id", "0"),
    ] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_set_flag(context.as_fd(), "default_permissions")?;
    fsconfig_set_flag(context.as_fd(), "allow_other")?;
    fsconfig_create(context.as_fd())?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    if read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Waits for the next request and returns its length in `buffer`; None once the writer of `stopped` is closed or the file
/// system has ended. Blocks.
pub fn next_request(device: &OwnedFd, stopped: &PipeReader, buffer: &mut [u8]) -> Option<usize> {
    loop {
        let mut wait = [
            PollFd::new(device.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut wait, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return None,
        }
        if wait[1].revents().is_some_and(|events| !events.is_empty()) {
            return None;
        }
        match rustix::io::read(device, &mut *buffer) {
            Ok(length) => return Some(length),
            // ENOENT: the request was interrupted before it was read.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => {}
            // ENODEV: the file system has ended.
            Err(_) => return None,
        }
    }
}

/// Adds the step to an error.
pub fn named(step: &'static str) -> impl FnOnce(rustix::io::Errno) -> io::Error {
    move |errno| {
        let error = io::Error::from(errno);
        io::Error::new(error.kind(), format!("failed to {step}: {error}"))
    }
}
