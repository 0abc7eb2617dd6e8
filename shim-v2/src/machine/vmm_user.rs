//! [`UserClaim`]: an own user and group id for the VM's processes, so that a VMM that a guest has taken over is a stranger to
//! the host's files and to other pods' VMs.
//!
//! Ids come from a configured range. Each shim of the node holds a lock on one byte of a common file, the byte of its VM's id;
//! the kernel releases the lock with the shim, after whose death the VM does not live on. The search starts at a hash of the
//! pod's id, so that an id is seldom used twice in a row. All calls block.

use crate::error::{Result, ShimError};
use boxlite_proto::vmm::{IdRange, VmmUsers};
use boxlite_sys::file_lock::open_for_ranges;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::path::{Path, PathBuf};

/// No user could be claimed.
#[derive(Debug, thiserror::Error)]
pub(super) enum UserError {
    /// The registry cannot be used.
    #[error("failed to lock {}", path.display())]
    Registry {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// Every id is taken.
    #[error("all {} ids of pod.vmm_ids are in use", ids.count)]
    Exhausted { ids: IdRange },
}

/// An id that no other VM of the node has. Released on drop.
#[derive(Debug)]
pub(super) struct UserClaim {
    id: u32,
    offset: u32,
    /// Holds the lock.
    registry: File,
}

impl UserClaim {
    /// Claims a free id of the range for the pod `pod`.
    ///
    /// # Errors
    /// The registry cannot be used, or every id of the range is taken.
    pub(super) fn new(users: &VmmUsers, pod: &str) -> std::result::Result<Self, UserError> {
        let failed = |source| UserError::Registry {
            path: users.registry.clone(),
            source,
        };
        let registry = open_for_ranges(&users.registry).map_err(failed)?;
        let start = start_offset(pod, users.ids.count);
        let offsets = (start..users.ids.count).chain(0..start);
        for offset in offsets {
            match set_lock(&registry, offset, libc::F_WRLCK) {
                Ok(()) => {
                    return Ok(Self {
                        id: users.ids.first + offset,
                        offset,
                        registry,
                    });
                }
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        Err(UserError::Exhausted { ids: users.ids })
    }

    /// Returns the id, for user and group.
    pub(super) fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for UserClaim {
    fn drop(&mut self) {
        // Not by closing the file alone: a child that has not executed its program yet shares it, and the lock.
        let _unlocked = set_lock(&self.registry, self.offset, libc::F_UNLCK);
    }
}

/// Returns whether this process can give its children the ids, which are not mapped in a user namespace such as that of a
/// rootless container.
pub(super) fn are_mapped(ids: IdRange) -> bool {
    ["/proc/self/uid_map", "/proc/self/gid_map"]
        .iter()
        .all(|path| std::fs::read_to_string(path).is_ok_and(|map| covers(&map, ids)))
}

/// Returns whether one extent of a map has all ids.
fn covers(map: &str, ids: IdRange) -> bool {
    let (first, count) = (u64::from(ids.first), u64::from(ids.count));
    map.lines().any(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        match (numbers.next(), numbers.nth(1)) {
            (Some(Ok(start)), Some(Ok(length))) => {
                start <= first && first + count <= start + length
            }
            _ => false,
        }
    })
}

/// Makes `user` the owner of files of its VM, which do not exist for other processes yet. Links are not followed.
///
/// # Errors
/// Io with the path.
pub(super) fn give(user: u32, paths: &[&Path]) -> Result<()> {
    for path in paths {
        std::os::unix::fs::lchown(path, Some(user), Some(user))
            .map_err(ShimError::io("change the owner of", path.display()))?;
    }
    Ok(())
}

fn start_offset(pod: &str, count: u32) -> u32 {
    let digest = Sha256::digest(pod);
    let number = digest[..4]
        .iter()
        .fold(0, |n, byte| n << 8 | u32::from(*byte));
    number % count.max(1)
}

/// Locks or unlocks one byte for the open file rather than for the process, so that pods of one process, as in tests, are
/// apart.
fn set_lock(file: &File, offset: u32, kind: libc::c_int) -> nix::Result<()> {
    let range = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: i64::from(offset),
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&range)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_distinct_until_dropped() {
        let dir = tempfile::tempdir().expect("a directory");
        let ids = IdRange {
            first: 100_000,
            count: 3,
        };
        let users = VmmUsers {
            registry: dir.path().join("state/users"),
            ids,
        };
        let claim = |pod: &str| UserClaim::new(&users, pod);
        let held: Vec<_> = ["a", "b", "c"].map(|pod| claim(pod).expect("free")).into();
        let mut taken: Vec<u32> = held.iter().map(UserClaim::id).collect();
        taken.sort_unstable();
        assert_eq!(taken, [100_000, 100_001, 100_002]);
        let error = claim("d").expect_err("none is free");
        assert!(matches!(error, UserError::Exhausted { .. }), "{error}");
        let first = held[0].id();
        drop(held);
        assert_eq!(claim("a").expect("released").id(), first, "by the pod's id");
    }

    #[test]
    fn ids_are_covered_by_one_extent_of_the_map() {
        let ids = |first, count| IdRange { first, count };
        let host = "         0          0 4294967295\n";
        assert!(covers(host, IdRange::DEFAULT));
        assert!(covers(host, ids(u32::MAX - 1, 1)));
        let container = "0 100000 65536\n100000 300000 10\n";
        assert!(!covers(container, IdRange::DEFAULT));
        assert!(covers(container, ids(100_003, 7)) && !covers(container, ids(100_003, 8)));
        assert!(!covers("", ids(1, 1)));
    }

    #[test]
    fn whole_id_space_does_not_overflow() {
        let dir = tempfile::tempdir().expect("a directory");
        let users = VmmUsers {
            registry: dir.path().join("users"),
            ids: IdRange {
                first: u32::MAX - 1,
                count: 1,
            },
        };
        assert_eq!(
            UserClaim::new(&users, "a").expect("free").id(),
            u32::MAX - 1
        );
    }
}
