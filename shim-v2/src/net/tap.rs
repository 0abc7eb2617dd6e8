//! TAP devices: created persistently for a pod, opened by a VMM. Always in the calling thread's network namespace.
//!
//! JUSTIFICATION for unsafe: /dev/net/tun has only an ioctl interface.

use nix::libc::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, IFNAMSIZ};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

mod ioctl {
    nix::ioctl_write_ptr_bad!(
        set_iff,
        nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
        super::Request
    );
    nix::ioctl_write_int_bad!(
        set_persist,
        nix::request_code_write!(b'T', 203, size_of::<nix::libc::c_int>())
    );
}

/// `struct ifreq` up to the fields that TUNSETIFF reads.
#[repr(C)]
pub struct Request {
    name: [u8; IFNAMSIZ],
    flags: nix::libc::c_short,
    rest: [u8; 22],
}

fn attach(name: &str) -> io::Result<File> {
    if name.is_empty() || name.len() >= IFNAMSIZ {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("invalid interface name {name:?}"),
        ));
    }
    // Ethernet frames with offload header (VNET_HDR) and without packet information (NO_PI). All three flags fit 16 bits.
    let flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as nix::libc::c_short;
    let mut request = Request {
        name: [0; IFNAMSIZ],
        flags,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: the descriptor is open, and `request` has the layout and size (40 bytes) of the ifreq that is read.
    unsafe { ioctl::set_iff(file.as_raw_fd(), &request) }?;
    Ok(file)
}

/// Opens the existing tap `name`.
///
/// # Errors
/// The kernel's error, for example if the device node is missing or the tap is in use.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    attach(name).map(OwnedFd::from)
}

/// Creates a tap that exists until it or its network namespace is deleted.
///
/// # Errors
/// The kernel's error.
pub fn create(name: &str) -> io::Result<()> {
    let file = attach(name)?;
    // SAFETY: the descriptor is open and attached; the argument is a plain number.
    unsafe { ioctl::set_persist(file.as_raw_fd(), 1) }?;
    Ok(())
}
