//! Attaches a BPF program to a cgroup and its descendants, with two calls of bpf(2).
//!
//! The kernel releases the program with the cgroup. [`super::devices`] and [`super::sockets`] generate programs.

use super::instruction::Instruction;
use super::sockets::Family;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Commands of linux/bpf.h.
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
/// Program types.
const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
/// Attach types.
const CGROUP_DEVICE: u32 = 6;
const CGROUP_INET4_BIND: u32 = 8;
const CGROUP_INET6_BIND: u32 = 9;
const CGROUP_INET4_CONNECT: u32 = 10;
const CGROUP_INET6_CONNECT: u32 = 11;
const CGROUP_INET4_GETPEERNAME: u32 = 29;
const CGROUP_INET6_GETPEERNAME: u32 = 30;
/// Flags of an attachment: descendants may have further programs; another program is replaced.
const ALLOW_MULTI: u32 = 2;
const REPLACE: u32 = 4;

/// Operation that a program decides on or changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hook {
    /// Creation and opening of devices. One program; descendants cannot attach others.
    Device,
    /// bind(2).
    Bind(Family),
    /// connect(2).
    Connect(Family),
    /// getpeername(2).
    PeerName(Family),
}

impl Hook {
    /// Returns the program type and the attach type.
    fn types(self) -> (u32, u32) {
        let attached = match self {
            Self::Device => return (PROG_TYPE_CGROUP_DEVICE, CGROUP_DEVICE),
            Self::Bind(Family::V4) => CGROUP_INET4_BIND,
            Self::Bind(Family::Mapped) => CGROUP_INET6_BIND,
            Self::Connect(Family::V4) => CGROUP_INET4_CONNECT,
            Self::Connect(Family::Mapped) => CGROUP_INET6_CONNECT,
            Self::PeerName(Family::V4) => CGROUP_INET4_GETPEERNAME,
            Self::PeerName(Family::Mapped) => CGROUP_INET6_GETPEERNAME,
        };
        (PROG_TYPE_CGROUP_SOCK_ADDR, attached)
    }
}

/// Leading members of `union bpf_attr` for BPF_PROG_LOAD; the kernel takes the rest as 0.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// Members of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
    replaced: u32,
}

/// Loads `program` and attaches it to `cgroup`, for sockets in place of `replaced` or in addition to others. Returns the
/// program, by which it can be replaced.
pub(crate) fn attach(
    cgroup: &Path,
    hook: Hook,
    program: &[Instruction],
    replaced: Option<&OwnedFd>,
) -> io::Result<OwnedFd> {
    let directory = File::open(cgroup)?;
    let (kind, attach_type) = hook.types();
    let load = Load {
        kind,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        expected_attach_type: attach_type,
    };
    // SAFETY: the attributes are live and of the given size; the `count` instructions and the license live until the
    // call returns. The kernel copies and verifies them.
    let loaded =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) };
    let loaded = i32::try_from(loaded).unwrap_or(-1);
    if loaded < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    let flags = match (hook, replaced) {
        (Hook::Device, _) => 0,
        (_, None) => ALLOW_MULTI,
        (_, Some(_)) => ALLOW_MULTI | REPLACE,
    };
    let attach = Attach {
        target: directory.as_raw_fd() as u32,
        program: loaded.as_raw_fd() as u32,
        kind: attach_type,
        flags,
        replaced: replaced.map_or(0, |program| program.as_raw_fd() as u32),
    };
    // SAFETY: the attributes are live and of the given size; all descriptors are open.
    let attached = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attach,
            size_of::<Attach>(),
        )
    };
    match attached {
        0 => Ok(loaded),
        _ => Err(io::Error::last_os_error()),
    }
}
