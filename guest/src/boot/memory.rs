//! Keeps the agent's pages in memory.

/// Locks what the agent has touched and will touch, about 10 MiB. Its code is page cache of a read-only file and would be
/// the first to go when containers fill the VM: with every call paging its way in from the disk again, the agent is alive
/// and of no use. Call after the spawner was forked, which needs little and needs it seldom.
pub fn lock() {
    // SAFETY: mlockall takes flags only and changes nothing but the residency of pages.
    let result =
        unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if result != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "the agent's memory is not locked");
    }
}
