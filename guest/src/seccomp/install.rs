//! Installs a [`Filter`] in the calling process; its children and programs inherit it.
//!
//! The caller has no_new_privs or CAP_SYS_ADMIN, and is single-threaded.

use super::Filter;
use std::io;

/// `SECCOMP_SET_MODE_FILTER`.
const SET_MODE_FILTER: libc::c_uint = 1;

/// Installs the filter, which cannot be removed again.
pub(crate) fn install(filter: &Filter) -> io::Result<()> {
    let mut program: Vec<libc::sock_filter> = filter
        .instructions()
        .into_iter()
        .map(|instruction| libc::sock_filter {
            code: instruction.code,
            jt: instruction.yes,
            jf: instruction.no,
            k: instruction.value,
        })
        .collect();
    let header = libc::sock_fprog {
        len: u16::try_from(program.len())
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the header points to `len` instructions that live until the call returns; the kernel copies and checks
    // them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SET_MODE_FILTER,
            filter.flags(),
            &raw const header,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
