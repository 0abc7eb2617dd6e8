//! Volumes that the kubelet updates atomically (ConfigMap, Secret, projected, downward API), which the guest copies into its
//! memory: [`version`] recognizes them, [`MirrorWatch`] reports each update to the guest, so that inotify watchers in the pod
//! get the events that they would get on a node.
//!
//! The link `..data` is polled: an inotify instance per pod would exhaust the node's `fs.inotify.max_user_instances` (128).
//!
//! ```text
//! kubelet renames ..data ─► poll sees another target ─► Mounts.Refresh ─► the guest copies the version, renames ..data
//! ```

use boxlite_portal::{GuestSession, PortalError};
use boxlite_proto::names::{ATOMIC_LINK, is_volume_version};
use boxlite_sys::report::Report;
use boxlite_sys::sync::Mutex;
use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Interval between two looks at the links.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Number of refreshes per change: the kubelet creates and removes links to files after the exchange, perhaps within the
/// resolution of the directory's modification time.
const REFRESHES: u32 = 2;
/// Maximum number of entries of a directory that is recognized.
const MAX_ENTRIES: usize = 512;

/// Returns the target of the link `..data` if `directory` is a volume as the kubelet writes it: a link `..data` to a
/// directory beside it, other directories whose names start with `..`, and links.
pub fn version(directory: &Path) -> Option<String> {
    let version = link_target(directory)?;
    let facts = fs::symlink_metadata(directory.join(&version)).ok()?;
    let mut entries = fs::read_dir(directory).ok()?;
    let plain = entries.by_ref().take(MAX_ENTRIES).all(|entry| {
        entry.is_ok_and(|entry| {
            let version = entry.file_name().as_bytes().starts_with(b"..");
            let kind = entry.file_type();
            kind.is_ok_and(|kind| kind.is_symlink() || kind.is_dir() && version)
        })
    });
    (facts.is_dir() && plain && entries.next().is_none()).then_some(version)
}

/// Returns the target of the link `..data` if it is the name of a version directory.
fn link_target(directory: &Path) -> Option<String> {
    let target = fs::read_link(directory.join(ATOMIC_LINK)).ok()?;
    let target = target.into_os_string().into_string().ok()?;
    is_volume_version(&target).then_some(target)
}

/// State of a volume on the host that changes with each update.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    version: String,
    modified: (i64, i64),
}

impl Seen {
    fn of(directory: &Path) -> Option<Self> {
        let version = link_target(directory)?;
        let facts = fs::metadata(directory).ok()?;
        Some(Self {
            version,
            modified: (facts.mtime(), facts.mtime_nsec()),
        })
    }
}

#[derive(Debug, Default)]
struct Mirrored {
    users: usize,
    seen: Option<Seen>,
    /// Number of refreshes that are due.
    due: u32,
    failing: bool,
}

/// The pod's copied volumes by their path below the share.
#[derive(Debug)]
pub struct MirroredVolumes {
    volumes: Mutex<HashMap<String, Mirrored>>,
    any_added: watch::Sender<bool>,
}

impl Default for MirroredVolumes {
    fn default() -> Self {
        Self {
            volumes: Mutex::default(),
            any_added: watch::Sender::new(false),
        }
    }
}

impl MirroredVolumes {
    /// Adds one use of a volume that the guest has copied. The copy is refreshed once more, in case the volume changed
    /// meanwhile.
    pub fn add(&self, path: &str) {
        let mut volumes = self.volumes.lock();
        let volume = volumes.entry(path.to_owned()).or_default();
        volume.users += 1;
        volume.due = REFRESHES;
        drop(volumes);
        self.any_added.send_replace(true);
    }

    /// Removes one use of a volume.
    pub fn remove(&self, path: &str) {
        let mut volumes = self.volumes.lock();
        if let Some(volume) = volumes.get_mut(path) {
            volume.users -= 1;
            if volume.users == 0 {
                volumes.remove(path);
            }
        }
    }

    /// Returns the volumes below the share at `share` to refresh, with their versions. Blocks.
    fn due(&self, share: &Path) -> Vec<(String, String)> {
        let paths: Vec<String> = self.volumes.lock().keys().cloned().collect();
        let mut due = Vec::new();
        for path in paths {
            // Without the lock: the host's file system may be slow.
            let Some(seen) = Seen::of(&share.join(&path)) else {
                continue;
            };
            let mut volumes = self.volumes.lock();
            let Some(volume) = volumes.get_mut(&path) else {
                continue;
            };
            if volume.seen.as_ref() != Some(&seen) {
                volume.due = REFRESHES;
                volume.seen = Some(seen.clone());
            }
            if volume.due > 0 {
                due.push((path, seen.version));
            }
        }
        due
    }

    /// Records the result of a refresh.
    fn refreshed(&self, path: &str, result: Result<bool, PortalError>) {
        let mut volumes = self.volumes.lock();
        let Some(volume) = volumes.get_mut(path) else {
            return;
        };
        match result {
            Ok(true) => {
                volume.due = volume.due.saturating_sub(1);
                volume.failing = false;
            }
            Ok(false) => {
                // The guest uses the share itself.
                volumes.remove(path);
            }
            Err(error) => {
                if !volume.failing {
                    let version = volume.seen.as_ref().map(|seen| seen.version.as_str());
                    tracing::warn!(volume = path, version, error = %Report(&error), "failed to update the guest's copy of a volume, retrying");
                }
                volume.failing = true;
            }
        }
    }
}

/// Watches the copied volumes of one VM.
#[derive(Debug)]
pub struct MirrorWatch {
    share: PathBuf,
    session: GuestSession,
}

impl MirrorWatch {
    /// Creates the watch of a guest with the share at `share`.
    pub fn new(share: &Path, session: &GuestSession) -> Self {
        Self {
            share: share.to_owned(),
            session: session.clone(),
        }
    }

    /// Runs until `ended`, on the shim's task tracker.
    pub async fn run(self, volumes: Arc<MirroredVolumes>, ended: CancellationToken) {
        let mut added = volumes.any_added.subscribe();
        tokio::select! {
            _ = added.wait_for(|added| *added) => {}
            () = ended.cancelled() => return,
        }
        loop {
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = ended.cancelled() => return,
            }
            let (looked, share) = (Arc::clone(&volumes), self.share.clone());
            let due = tokio::task::spawn_blocking(move || looked.due(&share)).await;
            for (path, version) in due.unwrap_or_default() {
                let mounts = self.session.mounts();
                let result = tokio::select! {
                    result = mounts.refresh(&path, &version) => result,
                    () = ended.cancelled() => return,
                };
                volumes.refreshed(&path, result);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn volume() -> tempfile::TempDir {
        let share = tempfile::tempdir().expect("tempdir");
        let at = share.path().join("m/a");
        fs::create_dir_all(at.join("..1")).expect("created");
        exchange(&at, "..1");
        symlink("..data/key", at.join("key")).expect("linked");
        share
    }

    fn exchange(at: &Path, version: &str) {
        symlink(version, at.join("..tmp")).expect("linked");
        fs::rename(at.join("..tmp"), at.join("..data")).expect("renamed");
    }

    #[test]
    fn version_recognizes_only_volumes_of_the_kubelet() {
        let share = volume();
        let at = share.path().join("m/a");
        assert_eq!(version(&at).as_deref(), Some("..1"));
        fs::write(at.join("file"), "").expect("written");
        assert_eq!(version(&at), None, "another file");
        fs::remove_file(at.join("file")).expect("removed");
        for target in ["/etc", "../..", "..", "v", "..missing"] {
            exchange(&at, target);
            assert_eq!(version(&at), None, "{target}");
        }
        assert_eq!(version(share.path()), None);
    }

    #[test]
    fn due_reports_each_change_until_it_is_refreshed() {
        let share = volume();
        let at = share.path().join("m/a");
        let volumes = MirroredVolumes::default();
        volumes.add("m/a");
        let expected = |version: &str| vec![("m/a".to_owned(), version.to_owned())];
        for _ in 0..REFRESHES {
            assert_eq!(volumes.due(share.path()), expected("..1"));
            volumes.refreshed("m/a", Ok(true));
        }
        assert!(volumes.due(share.path()).is_empty());
        fs::create_dir(at.join("..2")).expect("created");
        exchange(&at, "..2");
        assert_eq!(volumes.due(share.path()), expected("..2"));
        let error = PortalError::Deadline {
            call: "Mounts.Refresh",
            limit: Duration::ZERO,
        };
        volumes.refreshed("m/a", Err(error));
        for _ in 0..REFRESHES {
            assert_eq!(volumes.due(share.path()), expected("..2"));
            volumes.refreshed("m/a", Ok(true));
        }
        assert!(volumes.due(share.path()).is_empty());
        // A link to a new file, created after the exchange.
        std::thread::sleep(Duration::from_millis(20));
        symlink("..data/new", at.join("new")).expect("linked");
        assert_eq!(volumes.due(share.path()), expected("..2"));
        volumes.remove("m/a");
        assert!(volumes.due(share.path()).is_empty());
    }

    #[test]
    fn volume_without_copy_in_the_guest_is_not_polled() {
        let share = volume();
        let volumes = MirroredVolumes::default();
        volumes.add("m/a");
        assert_eq!(volumes.due(share.path()).len(), 1);
        volumes.refreshed("m/a", Ok(false));
        assert!(volumes.due(share.path()).is_empty());
        volumes.remove("m/a");
    }
}
