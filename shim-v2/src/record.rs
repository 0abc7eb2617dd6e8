//! What a shim writes down in its bundle so that `delete` can clean up after a crash: pids with start times, cgroups.
//!
//! A bare pid is never enough: the kernel reuses them, so each comes with the start time of its process. Written by the
//! daemon, read by `delete` and by a second `start`.

use boxlite_sys::process::ProcessId;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Name of the record in the bundle.
pub const RECORD_FILE: &str = "shim.json";
/// Name of the file with the shim's address in the bundle; containerd's convention.
pub const ADDRESS_FILE: &str = "address";

/// The record: everything of a shim that outlives its process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Record {
    /// The daemon.
    pub shim: Option<ProcessId>,
    /// The vmm child.
    pub vmm: Option<ProcessId>,
    /// Path of the shim's socket.
    pub socket: PathBuf,
    /// Cgroup directories that the shim made, parents first.
    pub cgroups: Vec<PathBuf>,
    /// The pod's network namespace, with taps of ours in it.
    pub netns: Option<PathBuf>,
    /// Scratch disk.
    #[serde(default)]
    pub scratch: Option<PathBuf>,
    /// Source of the mounts on the host that show the guest's.
    #[serde(default)]
    pub shown: String,
}

impl Record {
    /// Reads the record of a bundle. None: there is none, or it cannot be read as one (a crash before the first write).
    pub fn load(bundle: &Path) -> Option<Self> {
        let bytes = std::fs::read(bundle.join(RECORD_FILE)).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Writes the record, whole or not at all (temporary file, rename), readable by root only.
    ///
    /// # Errors
    /// When the bundle cannot be written.
    pub fn store(&self, bundle: &Path) -> io::Result<()> {
        write_whole(&bundle.join(RECORD_FILE), &serde_json::to_vec_pretty(self)?)
    }

    /// Removes record and address: the shim ends in order and leaves nothing to clean up.
    pub fn remove(bundle: &Path) {
        for name in [RECORD_FILE, ADDRESS_FILE] {
            // Missing is fine; anything else is the next `delete`'s to meet.
            drop(std::fs::remove_file(bundle.join(name)));
        }
    }
}

/// Writes a file of mode 0600 whole or not at all.
///
/// # Errors
/// When its directory cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    drop(file);
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_as_it_was() {
        let dir = tempfile::tempdir().expect("tempdir");
        assert!(Record::load(dir.path()).is_none());
        let record = Record {
            shim: ProcessId::of(std::process::id() as i32),
            vmm: None,
            socket: "/run/x".into(),
            cgroups: vec!["/sys/fs/cgroup/x".into()],
            netns: Some("/run/netns/x".into()),
            scratch: Some("/var/x.img".into()),
            shown: "boxlite:x".to_owned(),
        };
        record.store(dir.path()).expect("stored");
        assert_eq!(Record::load(dir.path()), Some(record));
    }
}
