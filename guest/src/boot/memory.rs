//! Keeps the agent's pages in memory.

/// Locks the agent's current and future pages, about 10 MiB. Its code is page cache of a read-only file and would be
/// evicted first when containers fill the VM; every call would then page it in from disk again, and the agent would
/// be alive but unusable. Called after the spawner was forked, which needs little memory and is used rarely.
pub(crate) fn lock() {
    // SAFETY: mlockall takes flags only and changes nothing but the residency of pages.
    let result =
        unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if result != 0 {
        tracing::warn!(error = %std::io::Error::last_os_error(), "failed to lock the agent's memory");
    }
}
