//! [`Volumes`]: which directories of the host containers of this pod may show mounts in.
//!
//! Written when containers are made and removed, read by [`super::Shown`]; nothing that the guest says gets in here.

use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::MutexGuard;
use std::time::Duration;
use tokio::sync::watch;

/// How long the making of a container waits until the guest's list is read: a call into a guest that is busy.
const FOLLOWED_LIMIT: Duration = Duration::from_secs(20);

/// A directory of the host, as it was when a container got it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its path, links resolved.
    pub source: PathBuf,
    /// The directory itself.
    pub device: u64,
    pub inode: u64,
}

/// By path below the share.
#[derive(Debug)]
pub struct Volumes {
    known: Mutex<HashMap<String, (Volume, usize)>>,
    wanted: watch::Sender<bool>,
    followed: watch::Sender<bool>,
}

impl Default for Volumes {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            wanted: watch::Sender::new(false),
            followed: watch::Sender::new(false),
        }
    }
}

impl Volumes {
    /// Adds a volume for one more container.
    ///
    /// # Errors
    /// The directory cannot be looked at.
    pub fn add(&self, place: &str, source: &Path) -> std::io::Result<()> {
        let metadata = std::fs::metadata(source)?;
        let volume = Volume {
            source: source.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        self.lock().entry(place.to_owned()).or_insert((volume, 0)).1 += 1;
        self.wanted.send_replace(true);
        Ok(())
    }

    /// One container less has it.
    pub fn remove(&self, place: &str) {
        let mut known = self.lock();
        if let Some((_, count)) = known.get_mut(place) {
            *count -= 1;
            if *count == 0 {
                known.remove(place);
            }
        }
    }

    /// The volume at a path below the share.
    pub fn get(&self, place: &str) -> Option<Volume> {
        Some(self.lock().get(place)?.0.clone())
    }

    /// Waits for the first volume of the pod.
    pub async fn wanted(&self) {
        // The sender is in this very value.
        let _ = self.wanted.subscribe().wait_for(|wanted| *wanted).await;
    }

    /// Says whether the guest's list is read.
    pub fn set_followed(&self, followed: bool) {
        self.followed.send_replace(followed);
    }

    /// Waits until the guest's list is read: a container that starts now mounts nothing unseen. False: it is not, in time.
    pub async fn followed(&self) -> bool {
        let mut followed = self.followed.subscribe();
        let wait = followed.wait_for(|followed| *followed);
        tokio::time::timeout(FOLLOWED_LIMIT, wait).await.is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, (Volume, usize)>> {
        self.known.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_volume_is_known_as_long_as_a_container_has_it() {
        let dir = tempfile::tempdir().expect("tempdir");
        let volumes = Volumes::default();
        assert!(volumes.add("m/a", &dir.path().join("missing")).is_err());
        volumes.add("m/a", dir.path()).expect("added");
        volumes.add("m/a", dir.path()).expect("added");
        volumes.wanted().await;
        volumes.remove("m/a");
        assert_eq!(volumes.get("m/a").expect("known").source, dir.path());
        assert!(volumes.get("m/b").is_none());
        volumes.remove("m/a");
        volumes.remove("m/a");
        assert!(volumes.get("m/a").is_none());
    }
}
