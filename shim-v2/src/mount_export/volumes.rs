//! [`ExportVolumes`]: the directories of the host below which containers of this pod may export mounts.
//!
//! Changed when containers are created and removed, read by [`super::MountExporter`]; no input of the guest changes it.

use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::MutexGuard;
use std::time::Duration;
use tokio::sync::watch;

/// Maximum time that container creation waits for the guest's mount list; the guest may be busy.
const WATCH_TIMEOUT: Duration = Duration::from_secs(20);

/// A directory of the host, identified when a container got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportVolume {
    /// Path with links resolved.
    pub source: PathBuf,
    /// Device and inode of the directory.
    pub device: u64,
    pub inode: u64,
}

/// ExportVolumes by their path below the share.
#[derive(Debug)]
pub struct ExportVolumes {
    known: Mutex<HashMap<String, (ExportVolume, usize)>>,
    any_added: watch::Sender<bool>,
    watched: watch::Sender<bool>,
}

impl Default for ExportVolumes {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            any_added: watch::Sender::new(false),
            watched: watch::Sender::new(false),
        }
    }
}

impl ExportVolumes {
    /// Adds one use of a volume.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn add(&self, share_path: &str, source: &Path) -> std::io::Result<()> {
        let metadata = std::fs::metadata(source)?;
        let volume = ExportVolume {
            source: source.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        self.lock()
            .entry(share_path.to_owned())
            .or_insert((volume, 0))
            .1 += 1;
        self.any_added.send_replace(true);
        Ok(())
    }

    /// Removes one use of a volume.
    pub fn remove(&self, share_path: &str) {
        let mut known = self.lock();
        if let Some((_, count)) = known.get_mut(share_path) {
            *count -= 1;
            if *count == 0 {
                known.remove(share_path);
            }
        }
    }

    /// Returns the volume at a path below the share.
    pub fn get(&self, share_path: &str) -> Option<ExportVolume> {
        Some(self.lock().get(share_path)?.0.clone())
    }

    /// Waits for the pod's first volume.
    pub async fn first_added(&self) {
        // The sender lives as long as `self`.
        let _ = self.any_added.subscribe().wait_for(|added| *added).await;
    }

    /// Records whether the guest's mount list is being read.
    pub fn set_watched(&self, watched: bool) {
        self.watched.send_replace(watched);
    }

    /// Waits until the guest's mount list is being read, so that no mount of a new container is missed. Returns false on timeout.
    pub async fn watched(&self) -> bool {
        let mut watched = self.watched.subscribe();
        let wait = watched.wait_for(|watched| *watched);
        tokio::time::timeout(WATCH_TIMEOUT, wait).await.is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (ExportVolume, usize)>> {
        self.known.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn get_returns_volume_until_last_use_is_removed() {
        let dir = tempfile::tempdir().expect("tempdir");
        let volumes = ExportVolumes::default();
        assert!(volumes.add("m/a", &dir.path().join("missing")).is_err());
        volumes.add("m/a", dir.path()).expect("added");
        volumes.add("m/a", dir.path()).expect("added");
        volumes.first_added().await;
        volumes.remove("m/a");
        assert_eq!(volumes.get("m/a").expect("known").source, dir.path());
        assert!(volumes.get("m/b").is_none());
        volumes.remove("m/a");
        volumes.remove("m/a");
        assert!(volumes.get("m/a").is_none());
    }
}
