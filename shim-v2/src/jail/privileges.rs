//! Privileges of the jailed process: capabilities, no_new_privs, RLIMIT_NOFILE.
//!
//! A file server acting for the guest needs the file capabilities. CAP_MKNOD and CAP_DAC_READ_SEARCH are not among them:
//! open_by_handle_at with the latter escapes any mount namespace.

use super::{JailError, system};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::set_no_new_privs;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Limit of open files: libkrun and virtiofsd hold one per inode that the guest has looked up. Equals the kernel's default
/// ceiling (fs.nr_open).
const MAX_OPEN_FILES: u64 = 1 << 20;

/// Capabilities that the virtiofs server needs to act for any user of the guest, and CAP_SETPCAP, without which virtiofsd cannot drop the
/// others and refuses to start. CAP_SETPCAP cannot add capabilities.
const FILE_CAPABILITIES: [Capability; 8] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETPCAP,
];

/// Raises the limit of open files as far as permitted.
pub fn raise_file_limit() {
    if setrlimit(Resource::RLIMIT_NOFILE, MAX_OPEN_FILES, MAX_OPEN_FILES).is_ok() {
        return;
    }
    // Without CAP_SYS_RESOURCE, up to the hard limit. If that fails, the current limit serves fewer files.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _unchanged = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Forbids core dumps of this process, in which libkrun remains, and its children: they would contain the guest's memory.
///
/// # Errors
/// The kernel refused.
pub fn forbid_core_dumps() -> Result<(), JailError> {
    boxlite_sys::core_dumps::forbid().map_err(|error| {
        let errno = nix::Error::from_raw(error.raw_os_error().unwrap_or_default());
        system("forbid core dumps")(errno)
    })
}

/// Keeps the file capabilities for this process and its children, and prevents gaining others.
pub(super) fn reduce() -> Result<(), JailError> {
    set_no_new_privs().map_err(system("set no_new_privs"))?;
    keep(&FILE_CAPABILITIES.into_iter().collect())
}

/// Drops every capability for this process and its future children.
///
/// # Errors
/// The kernel refused.
pub fn drop_all_capabilities() -> Result<(), JailError> {
    keep(&CapsHashSet::new())
}

fn keep(wanted: &CapsHashSet) -> Result<(), JailError> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(JailError::Capabilities)?;
    if permitted.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::read(None, CapSet::Bounding).map_err(JailError::Capabilities)?;
        for capability in bounding.difference(wanted) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(JailError::Capabilities)?;
        }
    }
    let kept: CapsHashSet = permitted.intersection(wanted).copied().collect();
    caps::clear(None, CapSet::Ambient).map_err(JailError::Capabilities)?;
    caps::set(None, CapSet::Effective, &kept).map_err(JailError::Capabilities)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(JailError::Capabilities)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).map_err(JailError::Capabilities)
}
