//! What the jailed process may do: capabilities, no_new_privs, the limit of open files.
//!
//! A file server on behalf of the guest needs the file capabilities and nothing more. Not among them: CAP_MKNOD and
//! CAP_DAC_READ_SEARCH, by which (open_by_handle_at) a process leaves any mount namespace.

use super::{JailError, system};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::set_no_new_privs;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Open files wanted: libkrun and virtiofsd hold one per inode the guest has looked at. The kernel's default ceiling
/// (fs.nr_open).
const OPEN_FILES: u64 = 1 << 20;

/// What the virtiofs server needs to act for any user of the guest; and CAP_SETPCAP, without which virtiofsd cannot give
/// up the rest and refuses to start. It gives no way to gain anything.
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

/// Raises the limit of open files as far as this process may.
pub fn raise_file_limit() {
    if setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES).is_ok() {
        return;
    }
    // Without CAP_SYS_RESOURCE: up to the hard limit. A refusal leaves what there was, which works, for fewer files.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _unchanged = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Keeps the file capabilities, for this process and what it starts, and forbids gaining others.
pub(super) fn reduce() -> Result<(), JailError> {
    set_no_new_privs().map_err(system("setting no_new_privs"))?;
    keep(&FILE_CAPABILITIES.into_iter().collect())
}

/// Gives up every capability, for this process and what it starts from now on.
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
