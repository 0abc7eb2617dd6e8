//! [`WriterRegistry`]: notices host directories that another pod of the node mounts with write access, too.
//!
//! File locks of a VM do not reach the host, so programs in two pods that guard their files by locks would damage them. Each
//! directory is one byte of a file, chosen by a hash of device and inode, and each shim holds a shared record lock on the
//! bytes of its pod. The kernel releases record locks with their process, so a killed shim leaves none, and names the process
//! that holds one. They are also released when the process closes any descriptor of the file: it is opened once.
//!
//! Compares directories, not trees: a directory inside another pod's volume is another directory. All calls block.

use crate::error::{Result, ShimError};
use boxlite_proto::vmm::{SharedVolumeWriters, VolumeWriters};
use boxlite_sys::file_lock::open_for_ranges;
use boxlite_sys::sync::Mutex;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Attempts to get a shared lock while another shim tests for an exclusive one, which takes it two system calls.
const SHARED_LOCK_ATTEMPTS: u32 = 100;
const SHARED_LOCK_INTERVAL: Duration = Duration::from_millis(10);

/// One use of a directory by a container; see [`WriterRegistry::release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WriterClaim(i64);

/// The directories that this pod mounts with write access.
#[derive(Debug, Default)]
pub struct WriterRegistry(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    options: Option<VolumeWriters>,
    file: Option<File>,
    /// Number of uses by byte of the file.
    uses: HashMap<WriterClaim, usize>,
}

impl WriterRegistry {
    /// Sets the registry's file and the policy. Without options no directory is recorded.
    pub fn configure(&self, options: Option<VolumeWriters>) {
        self.0.lock().options = options;
    }

    /// Records a container's write access to `source`. If another pod has it, too, a warning is logged. Returns None for files
    /// and without options.
    ///
    /// # Errors
    /// With the policy `refuse`: VolumeInUse if another pod has write access, Io if the registry cannot be used.
    pub fn claim(&self, source: &Path) -> Result<Option<WriterClaim>> {
        let Some(options) = self.0.lock().options.clone() else {
            return Ok(None);
        };
        // Without the lock: the path of a stalled volume may not answer, and the driver calls `clear`.
        let facts = std::fs::metadata(source).map_err(ShimError::io("read", source.display()))?;
        if !facts.is_dir() {
            return Ok(None);
        }
        let claim = WriterClaim::of(&facts);
        let mut state = self.0.lock();
        if let Some(uses) = state.uses.get_mut(&claim) {
            *uses += 1;
            return Ok(Some(claim));
        }
        match state.lock(&options, claim) {
            Ok(None) => {}
            Ok(Some(other)) if options.policy == SharedVolumeWriters::Refuse => {
                return Err(ShimError::VolumeInUse {
                    path: source.to_owned(),
                    other,
                });
            }
            Ok(Some(other)) => tracing::warn!(
                volume = %source.display(),
                other_pod = other,
                "volume is writable in another pod, too: file locks do not reach beyond a pod (docs/volumes.md)"
            ),
            Err(error) if options.policy == SharedVolumeWriters::Refuse => {
                return Err(ShimError::io("lock", options.registry.display())(error));
            }
            Err(error) => {
                tracing::warn!(registry = %options.registry.display(), %error, "failed to record volume");
                return Ok(None);
            }
        }
        state.uses.insert(claim, 1);
        Ok(Some(claim))
    }

    /// Ends one use.
    pub fn release(&self, claim: WriterClaim) {
        let mut state = self.0.lock();
        match state.uses.get_mut(&claim) {
            Some(1) => {
                state.uses.remove(&claim);
                state.unlock(claim);
            }
            Some(uses) => *uses -= 1,
            None => {}
        }
    }

    /// Ends all uses: the VM is gone.
    pub fn clear(&self) {
        let mut state = self.0.lock();
        state.uses.clear();
        // Closing the file releases its locks.
        state.file = None;
    }
}

impl State {
    /// Locks a byte for this process. Returns the other pod if there is one; the byte is then locked only with the policy `warn`.
    fn lock(
        &mut self,
        options: &VolumeWriters,
        claim: WriterClaim,
    ) -> std::io::Result<Option<String>> {
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(open_for_ranges(&options.registry)?),
        };
        let mut other = None;
        match claim.set(file, libc::F_WRLCK) {
            Ok(()) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => {
                other = Some(claim.holder(file).map_or("unknown".to_owned(), sandbox_of));
                if options.policy == SharedVolumeWriters::Refuse {
                    return Ok(other);
                }
            }
            Err(errno) => return Err(errno.into()),
        }
        for _ in 0..SHARED_LOCK_ATTEMPTS {
            match claim.set(file, libc::F_RDLCK) {
                Err(Errno::EAGAIN | Errno::EACCES) => std::thread::sleep(SHARED_LOCK_INTERVAL),
                done => return done.map(|()| other).map_err(Into::into),
            }
        }
        Err(Errno::EAGAIN.into())
    }

    fn unlock(&self, claim: WriterClaim) {
        if let Some(file) = &self.file
            && let Err(errno) = claim.set(file, libc::F_UNLCK)
        {
            tracing::warn!(%errno, "failed to unlock volume registry");
        }
    }
}

impl WriterClaim {
    fn of(facts: &Metadata) -> Self {
        let mut hash = Sha256::new();
        hash.update(facts.dev().to_le_bytes());
        hash.update(facts.ino().to_le_bytes());
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&hash.finalize()[..8]);
        // Half of the greatest offset: the end of the range must be one, too.
        Self(i64::from_le_bytes(bytes) & (i64::MAX >> 1))
    }

    fn range(self, kind: libc::c_int) -> libc::flock {
        libc::flock {
            l_type: i16::try_from(kind).unwrap_or_default(),
            l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
            l_start: self.0,
            l_len: 1,
            l_pid: 0,
        }
    }

    fn set(self, file: &File, kind: libc::c_int) -> nix::Result<()> {
        fcntl(file, FcntlArg::F_SETLK(&self.range(kind))).map(drop)
    }

    /// Returns the pid of a process that holds the byte.
    fn holder(self, file: &File) -> Option<i32> {
        let mut range = self.range(libc::F_WRLCK);
        fcntl(file, FcntlArg::F_GETLK(&mut range)).ok()?;
        let free = i32::from(range.l_type) == libc::F_UNLCK;
        (!free && range.l_pid > 0).then_some(range.l_pid)
    }
}

/// Returns the sandbox id of another shim from its command line, else its pid.
fn sandbox_of(pid: i32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let mut words = line
        .split(|byte| *byte == 0)
        .skip_while(|word| *word != b"-id");
    match words.nth(1) {
        Some(id) if !id.is_empty() => String::from_utf8_lossy(id).into_owned(),
        _ => format!("of process {pid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(directory: &Path, policy: SharedVolumeWriters) -> Option<VolumeWriters> {
        Some(VolumeWriters {
            registry: directory.join("state/registry"),
            policy,
        })
    }

    /// Locks the byte as another process would: locks of an open file description conflict with the process' own.
    fn lock_elsewhere(file: &File, claim: WriterClaim) -> nix::Result<()> {
        fcntl(file, FcntlArg::F_OFD_SETLK(&claim.range(libc::F_RDLCK))).map(drop)
    }

    #[test]
    fn claim_of_a_directory_in_use_follows_the_policy() {
        let dir = tempfile::tempdir().expect("tempdir");
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).expect("created");
        let registry = WriterRegistry::default();
        assert_eq!(registry.claim(&volume).expect("not configured"), None);
        registry.configure(options(dir.path(), SharedVolumeWriters::Refuse));
        let claim = registry.claim(&volume).expect("claimed").expect("recorded");
        let other = open_for_ranges(&dir.path().join("state/registry")).expect("opened");
        lock_elsewhere(&other, claim).expect("shared");
        assert_eq!(registry.claim(&volume).expect("own use"), Some(claim));
        registry.release(claim);
        registry.release(claim);
        let error = registry.claim(&volume).expect_err("refused");
        assert!(
            matches!(&error, ShimError::VolumeInUse { path, .. } if *path == volume),
            "{error}"
        );
        registry.configure(options(dir.path(), SharedVolumeWriters::Warn));
        assert_eq!(registry.claim(&volume).expect("warned"), Some(claim));
    }

    #[test]
    fn release_of_the_last_use_unlocks_the_byte() {
        let dir = tempfile::tempdir().expect("tempdir");
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).expect("created");
        let registry = WriterRegistry::default();
        registry.configure(options(dir.path(), SharedVolumeWriters::Warn));
        let claim = registry.claim(&volume).expect("claimed").expect("recorded");
        registry.claim(&volume).expect("claimed").expect("recorded");
        let other = open_for_ranges(&dir.path().join("state/registry")).expect("opened");
        let exclusive = || {
            let range = claim.range(libc::F_WRLCK);
            fcntl(&other, FcntlArg::F_OFD_SETLK(&range)).is_ok()
        };
        assert!(!exclusive());
        registry.release(claim);
        assert!(!exclusive(), "one use remains");
        registry.release(claim);
        assert!(exclusive());
    }

    #[test]
    fn claim_of_a_file_is_not_recorded() {
        let file = tempfile::NamedTempFile::new().expect("file");
        let dir = tempfile::tempdir().expect("tempdir");
        let registry = WriterRegistry::default();
        registry.configure(options(dir.path(), SharedVolumeWriters::Refuse));
        assert_eq!(registry.claim(file.path()).expect("ignored"), None);
    }
}
