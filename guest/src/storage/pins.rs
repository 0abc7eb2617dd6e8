//! Keeps the submounts of volumes that follow the host's mounts: [`follow`].
//!
//! Where the host announces its mounts (libkrun does), one that it makes later comes up in the guest as a submount of the
//! container that first looks at it, and goes when the host takes it away. If its last user is then a file being closed, it ends
//! before the release of that file has been answered, and the kernel (6.12) has a BUG: "Busy inodes after unmount of
//! virtiofs". An open descriptor of it, kept until the VM ends, makes sure that it never ends.

use boxlite_sys::mountinfo::mounts;
use boxlite_sys::sync::Mutex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::fs::{Mode, OFlags, ResolveFlags, fstat, openat2};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Most submounts kept; what comes then is not, which is as good as it was without this.
const LIMIT: usize = 1024;
/// Pause between two looks at whether the container still runs, in ms; its mounts wake at once.
const PAUSE: u16 = 1000;

/// By device number: each submount has its own.
static PINS: Mutex<Option<HashMap<u64, OwnedFd>>> = Mutex::new(None);

/// Keeps every submount that comes up in the mount namespace of process `pid`, until `ended`. Blocks.
pub fn follow(pid: i32, ended: impl Fn() -> bool) {
    let Ok(table) = File::open(format!("/proc/{pid}/mountinfo")) else {
        return;
    };
    while !ended() {
        pin_all(pid);
        // The kernel tells a change of the table as an exceptional condition of this very descriptor.
        let mut wait = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
        let _ = poll(&mut wait, PollTimeout::from(PAUSE));
    }
}

fn pin_all(pid: i32) {
    let text = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
    for mount in mounts(&text).filter(|mount| mount.kind == "virtiofs") {
        if let Some((device, submount)) = open(pid, &mount.point) {
            let mut pins = PINS.lock();
            let pins = pins.get_or_insert_default();
            if pins.len() < LIMIT {
                pins.entry(device).or_insert(submount);
            }
        }
    }
}

/// The container may change what is where meanwhile: nothing outside of its root is reached, and what is opened is only kept.
fn open(pid: i32, point: &Path) -> Option<(u64, OwnedFd)> {
    let root = File::open(format!("/proc/{pid}/root")).ok()?;
    let path = point.strip_prefix("/").ok()?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let opened = openat2(&root, path, flags, Mode::empty(), resolve).ok()?;
    let device = fstat(&opened).ok()?.st_dev;
    Some((device, opened))
}
