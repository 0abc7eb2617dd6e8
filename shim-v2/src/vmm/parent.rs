//! [`require_shim`]: whether the vmm child still has its shim.

use super::step::StepExt;
use boxlite_proto::error::BoxliteResult;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

/// Checks that the shim lives: it keeps the spec's pipe open until it exits. Called after the parent-death signal was set.
pub(super) fn require_shim() -> BoxliteResult<()> {
    let stdin = std::io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).step("poll the spec's pipe")?;
    let closed = fds[0]
        .revents()
        .is_some_and(|events| events.contains(PollFlags::POLLHUP));
    match closed {
        true => Err(std::io::Error::other("the shim has exited")).step("look for the shim"),
        false => Ok(()),
    }
}
