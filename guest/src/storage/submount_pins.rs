//! Keeps submounts of volumes that follow the host's mounts alive: [`follow`].
//!
//! If the host announces its mounts (libkrun does), a later mount appears in the guest as a submount of the container
//! that first accesses it, and disappears when the host unmounts it. If its last user is a file being closed, it ends
//! before the release of that file was answered, and the kernel (6.12) has a bug: "Busy inodes after unmount of
//! virtiofs". An open descriptor, kept until the VM ends, prevents the submount from ending.

use boxlite_sys::mountinfo::mounts;
use boxlite_sys::sync::Mutex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Maximum number of submounts kept; further ones are not protected.
const MAX_PINS: usize = 1024;
/// Interval in ms between checks whether the container still runs; changes of its mounts wake the thread immediately.
const POLL_INTERVAL_MS: u16 = 1000;

/// Descriptors by device number; each submount has its own.
static PINS: Mutex<Option<HashMap<u64, OwnedFd>>> = Mutex::new(None);

/// Pins every submount that appears in the mount namespace of process `pid`, until `ended` returns true. Blocks.
pub(crate) fn follow(pid: i32, ended: impl Fn() -> bool) {
    let Ok(table) = File::open(format!("/proc/{pid}/mountinfo")) else {
        return;
    };
    while !ended() {
        pin_all(pid);
        // The kernel reports a change of the table as an exceptional condition of this descriptor.
        let mut wait = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
        let _ = poll(&mut wait, PollTimeout::from(POLL_INTERVAL_MS));
    }
}

fn pin_all(pid: i32) {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    for mount in mounts(&text).filter(|mount| mount.kind == "virtiofs") {
        if let Some((device, submount)) = open(pid, &mount.point) {
            let mut pins = PINS.lock();
            let pins = pins.get_or_insert_default();
            if pins.len() < MAX_PINS {
                pins.entry(device).or_insert(submount);
            }
        }
    }
}

/// Opens a mount point below the container's root. The container may change its mounts concurrently, so the
/// descriptor is only kept, not used.
fn open(pid: i32, point: &Path) -> Option<(u64, OwnedFd)> {
    let root = File::open(format!("/proc/{pid}/root")).ok()?;
    let path = point.strip_prefix("/").ok()?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = openat2(&root, path, flags, Mode::empty(), resolve).ok()?;
    let device = fstat(&opened).ok()?.st_dev;
    Some((device, opened))
}
