//! [`Disk`]: a block device of the host for a test: a loop device of a sparse file. Loop devices are the machine's, whatever
//! namespaces this program has made.

use crate::enclave::run;
use crate::outcome::Result;
use crate::{ensure, wait};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of the disk.
pub const SIZE: u64 = 8 << 20;
/// How long a disk may be in use after the answer: descriptors close with threads and processes.
const SETTLE: Duration = Duration::from_secs(10);

/// See the module. Gone with the value.
pub struct Disk {
    /// Its node.
    pub node: PathBuf,
    /// Its number may be another's once it is not.
    attached: bool,
}

impl Disk {
    /// Of zeroes, by a file of `dir`.
    pub fn new(dir: &Path) -> Result<Self> {
        let file = dir.join("disk");
        File::create(&file)?.set_len(SIZE)?;
        let node = run(
            "losetup",
            &["--find", "--show", &file.display().to_string()],
        )?;
        Ok(Self {
            node: node.trim().into(),
            attached: true,
        })
    }

    /// As others on the host see it: not what was read before.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        File::open(&self.node)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Writes and flushes, as others on the host do.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result {
        let disk = File::options().write(true).open(&self.node)?;
        disk.write_all_at(bytes, offset)?;
        Ok(disk.sync_all()?)
    }

    /// Fails as long as a process has it: one that is detached goes with its last user.
    pub async fn given_up(mut self) -> Result {
        let node = self.node.display().to_string();
        run("losetup", &["--detach", &node])?;
        self.attached = false;
        wait::until("the end of the disk", SETTLE, || async {
            let left = run("losetup", &["--list", "--noheadings", "--output", "NAME"])?;
            ensure!(left.lines().all(|line| line.trim() != node), "{left}");
            Ok(())
        })
        .await
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.attached {
            // It goes with its last user.
            let _ = run("losetup", &["--detach", &self.node.display().to_string()]);
        }
    }
}
