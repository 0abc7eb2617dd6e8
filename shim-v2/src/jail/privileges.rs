//! Privileges of the jailed process: capabilities, no_new_privs, RLIMIT_NOFILE.
//!
//! A file server acting for the guest needs the file capabilities. CAP_MKNOD and CAP_DAC_READ_SEARCH are not among them:
//! open_by_handle_at with the latter escapes any mount namespace.

use super::{JailError, system};
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::{set_dumpable, set_no_new_privs, set_pdeathsig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

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

/// Maximum number of threads of a VM's user. QEMU has at most 64 for disks and one per virtual CPU.
const MAX_THREADS: u64 = 1024;

/// Limits the size of files that this process and its future children write, and the number of threads of the VM's user. The
/// latter has no effect on root.
///
/// # Errors
/// The kernel refused.
pub fn limit_resources(max_file_bytes: u64) -> Result<(), JailError> {
    for (resource, limit) in [
        (Resource::RLIMIT_FSIZE, max_file_bytes),
        (Resource::RLIMIT_NPROC, MAX_THREADS),
    ] {
        let (_, hard) = getrlimit(resource).map_err(system("read resource limits"))?;
        let limit = limit.min(hard);
        setrlimit(resource, limit, limit).map_err(system("limit resources"))?;
    }
    Ok(())
}

/// Forbids other processes of the same user to trace this one or to read its memory, until an exec.
///
/// # Errors
/// The kernel refused.
pub(super) fn forbid_tracing() -> Result<(), JailError> {
    set_dumpable(false).map_err(system("forbid tracing"))
}

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

/// Limits the number of open files of this process and its future children.
///
/// # Errors
/// The kernel refused.
pub fn limit_files(max: u64) -> Result<(), JailError> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(system("read resource limits"))?;
    let limit = max.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).map_err(system("limit open files"))
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

/// Forbids this process and its future children to gain privileges by starting a program.
///
/// # Errors
/// The kernel refused.
pub fn forbid_new_privileges() -> Result<(), JailError> {
    set_no_new_privs().map_err(system("set no_new_privs"))
}

/// Keeps the file capabilities for this process and its children, and prevents gaining others.
pub(super) fn reduce() -> Result<(), JailError> {
    forbid_new_privileges()?;
    keep(&FILE_CAPABILITIES.into_iter().collect())
}

/// Makes this single-threaded process and its future children run as user and group `id`, with the supplementary `groups`
/// and without capabilities. A parent-death signal SIGKILL remains in force; the caller must check afterwards that the parent
/// has not died meanwhile.
///
/// # Errors
/// The kernel refused.
pub fn become_user(id: u32, groups: &[Gid]) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    let permitted = caps::read(None, CapSet::Permitted).map_err(JailError::Capabilities)?;
    drop_bounding(&permitted, &CapsHashSet::new())?;
    setgroups(groups).map_err(system("set the groups"))?;
    setresgid(gid, gid, gid).map_err(system("set the group"))?;
    setresuid(uid, uid, uid).map_err(system("set the user"))?;
    // The kernel clears it with a change of the user.
    set_pdeathsig(Signal::SIGKILL).map_err(system("set the parent-death signal"))
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
    drop_bounding(&permitted, wanted)?;
    let kept: CapsHashSet = permitted.intersection(wanted).copied().collect();
    caps::clear(None, CapSet::Ambient).map_err(JailError::Capabilities)?;
    caps::set(None, CapSet::Effective, &kept).map_err(JailError::Capabilities)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(JailError::Capabilities)?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new()).map_err(JailError::Capabilities)
}

fn drop_bounding(permitted: &CapsHashSet, wanted: &CapsHashSet) -> Result<(), JailError> {
    if permitted.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::read(None, CapSet::Bounding).map_err(JailError::Capabilities)?;
        for capability in bounding.difference(wanted) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(JailError::Capabilities)?;
        }
    }
    Ok(())
}
