//! [`Disk`]: a host block device for a test, a loop device on a sparse file. Loop devices are not namespaced.

use crate::failure::Result;
use crate::namespaces::run;
use crate::{ensure, poll};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Size of the disk in bytes.
pub(crate) const DISK_BYTES: u64 = 8 << 20;
/// Time for the last user to release the disk: descriptors close with threads and processes.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);

/// A loop device, detached on drop.
pub(crate) struct Disk {
    /// Device node.
    pub node: PathBuf,
    /// True while the device is attached; afterwards another user may get its number.
    attached: bool,
}

impl Disk {
    /// Creates a disk of zeroes on a file in `dir`.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let file = dir.join("disk");
        File::create(&file)?.set_len(DISK_BYTES)?;
        let node = run(
            "losetup",
            &["--find", "--show", &file.display().to_string()],
        )?;
        Ok(Self {
            node: node.trim().into(),
            attached: true,
        })
    }

    /// Reads from the device, bypassing previously cached pages.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        File::open(&self.node)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Writes and flushes, as other host processes do.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result {
        let disk = File::options().write(true).open(&self.node)?;
        disk.write_all_at(bytes, offset)?;
        Ok(disk.sync_all()?)
    }

    /// Detaches the disk and fails if a process still uses it: a detached device disappears with its last user.
    pub(crate) async fn detached(mut self) -> Result {
        let node = self.node.display().to_string();
        run("losetup", &["--detach", &node])?;
        self.attached = false;
        poll::until("the end of the disk", SETTLE_TIMEOUT, || async {
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
            // The device disappears with its last user.
            let _ = run("losetup", &["--detach", &self.node.display().to_string()]);
        }
    }
}
