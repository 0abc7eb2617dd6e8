//! [`is_full`]: recognizes errors for lack of disk space, which callers report as an exhausted resource.

use std::io;

/// Returns true if the disk is full or a quota is exhausted.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_and_exhausted_quota_are_full() {
        let full = |errno| is_full(&io::Error::from_raw_os_error(errno));
        assert!(full(libc::ENOSPC) && full(libc::EDQUOT));
        assert!(!full(libc::EIO) && !full(libc::ENOMEM));
    }
}
