//! [`MountExporter`]: exports mounts that containers make below volumes with propagation Bidirectional to the host, by FUSE.
//!
//! It follows the guest's list within the limits of [`ExportVolumes`]: [`host_mounter`] mounts, [`pump`] carries the FUSE
//! messages. Watching the mount tables of containers is the agent's part.
//!
//! ```text
//! guest's list ─► path checked ─► FUSE mounted on the host, hidden from the share ─► messages pumped ─► acknowledged
//! ```
//! A mount is removed when it leaves the list and when its container or the VM ends. A killed shim leaves dead mounts, which
//! the action `delete` removes.

pub mod host_mounter;
mod pump;
pub mod volumes;

use boxlite_portal::{GuestSession, PortalError};
use boxlite_proto::boxlite::v1::{ExportedMount, WatchExportsRequest, WatchExportsResponse};
use boxlite_sys::report::Report;
use host_mounter::{ExportRequest, HostMount, HostMounter};
use pump::Pump;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use volumes::ExportVolumes;

/// Maximum number of exported mounts per guest; the agent lists at most as many.
const MAX_EXPORTS: usize = 64;
/// Maximum length of a path below a volume, in bytes.
const MAX_PATH_BYTES: usize = 1024;
/// Delay before a broken stream is reopened.
const REOPEN_DELAY: Duration = Duration::from_secs(1);
/// Number of acknowledgements buffered for the guest.
const CHANNEL_CAPACITY: usize = 4;
/// Maximum number of times that a mount with a broken connection is mounted again. A VM that was paused for long keeps its mounts; a guest that
/// hangs up repeatedly does not.
const MAX_REVIVALS: u32 = 3;

/// One exported mount on the host.
struct Export {
    target: PathBuf,
    mounted: HostMount,
    pump: Pump,
}

/// Follows one guest's list of mounts and mirrors it on the host.
pub struct MountExporter {
    session: GuestSession,
    mounter: HostMounter,
    volumes: Arc<ExportVolumes>,
    exports: BTreeMap<u64, Export>,
    /// The latest list.
    listed: BTreeMap<u64, ExportedMount>,
    /// Mounts that could not be exported, logged once each.
    refused: BTreeSet<u64>,
    /// Number of broken connections per mount.
    deaths: BTreeMap<u64, u32>,
    died: (mpsc::Sender<u64>, mpsc::Receiver<u64>),
}

impl MountExporter {
    /// Creates the exporter of one guest.
    pub fn new(session: &GuestSession, mounter: HostMounter, volumes: Arc<ExportVolumes>) -> Self {
        Self {
            session: session.clone(),
            mounter,
            volumes,
            exports: BTreeMap::new(),
            listed: BTreeMap::new(),
            refused: BTreeSet::new(),
            deaths: BTreeMap::new(),
            died: mpsc::channel(MAX_EXPORTS),
        }
    }

    /// Follows the guest's list until `ended`, then removes every mount. Runs on the shim's task tracker.
    pub async fn run(mut self, ended: CancellationToken) {
        tokio::select! {
            () = self.volumes.first_added() => {}
            () = ended.cancelled() => return,
        }
        // The list is followed for the lifetime of the VM, so it gets a dedicated connection.
        self.session = self.session.dedicated();
        while !ended.is_cancelled() {
            if let Err(error) = self.follow_stream(&ended).await {
                tracing::debug!(error = %Report(&error), "mount list stream broke, reopening");
            }
            self.volumes.set_watched(false);
            self.pause(&ended).await;
        }
        let all: Vec<u64> = self.exports.keys().copied().collect();
        for id in all {
            self.withdraw(id).await;
        }
        if let Err(error) = self.mounter.sweep().await {
            tracing::warn!(%error, "failed to sweep exported mounts");
        }
    }

    /// Waits before the stream is reopened and removes mounts whose connection breaks meanwhile.
    async fn pause(&mut self, ended: &CancellationToken) {
        let over = tokio::time::sleep(REOPEN_DELAY);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return,
                Some(id) = self.died.1.recv() => self.withdraw(id).await,
                () = ended.cancelled() => return,
            }
        }
    }

    async fn follow_stream(&mut self, ended: &CancellationToken) -> Result<(), PortalError> {
        let (acknowledge, requests) = mpsc::channel(CHANNEL_CAPACITY);
        let mounts = self.session.mounts();
        let opening = mounts.watch_exports(ReceiverStream::new(requests));
        tokio::pin!(opening);
        let mut lists: Streaming<WatchExportsResponse> = loop {
            tokio::select! {
                opened = &mut opening => break opened?,
                // Readers of a mount must not wait for a guest that does not answer. The next list mounts it again.
                Some(id) = self.died.1.recv() => self.withdraw(id).await,
                () = ended.cancelled() => return Ok(()),
            }
        };
        self.volumes.set_watched(true);
        // The guest answers again: earlier failures no longer count.
        self.deaths.clear();
        self.refused.clear();
        loop {
            let list = tokio::select! {
                list = lists.message() => list,
                Some(id) = self.died.1.recv() => {
                    self.revive(id).await;
                    continue;
                }
                () = ended.cancelled() => return Ok(()),
            };
            let list =
                list.map_err(|status| PortalError::from_status("Mounts.WatchExports", status))?;
            let Some(list) = list else {
                return Ok(());
            };
            let generation = list.generation;
            // Runs to completion even when `ended` fires, so that no mount exists without an entry in `exports`.
            self.follow(list).await;
            if acknowledge
                .send(WatchExportsRequest { generation })
                .await
                .is_err()
            {
                return Ok(());
            }
        }
    }

    /// Makes the host's mounts match the list.
    async fn follow(&mut self, list: WatchExportsResponse) {
        self.listed = list
            .mounts
            .into_iter()
            .take(MAX_EXPORTS)
            .map(|mount| (mount.id, mount))
            .collect();
        self.refused.retain(|id| self.listed.contains_key(id));
        self.deaths.retain(|id, _| self.listed.contains_key(id));
        let gone: Vec<u64> = self.exports.keys().copied().collect();
        for id in gone {
            if !self.listed.contains_key(&id) {
                self.withdraw(id).await;
            }
        }
        for (id, mount) in self.listed.clone() {
            if self.exports.contains_key(&id) || self.refused.contains(&id) {
                continue;
            }
            self.try_export(id, &mount).await;
        }
    }

    async fn try_export(&mut self, id: u64, mount: &ExportedMount) {
        if let Err(error) = self.export(id, mount).await {
            tracing::warn!(
                container = mount.container_id, path = mount.path, %error,
                "failed to export mount"
            );
            self.refused.insert(id);
        }
    }

    /// Mounts an export again after its connection broke.
    async fn revive(&mut self, id: u64) {
        if !self.exports.contains_key(&id) {
            return;
        }
        self.withdraw(id).await;
        let Some(mount) = self.listed.get(&id).cloned() else {
            return;
        };
        let deaths = self.deaths.entry(id).or_default();
        *deaths += 1;
        if *deaths > MAX_REVIVALS {
            self.refused.insert(id);
            return;
        }
        self.try_export(id, &mount).await;
    }

    async fn export(&mut self, id: u64, mount: &ExportedMount) -> std::io::Result<()> {
        let refuse = |reason: &str| Err(std::io::Error::other(reason.to_owned()));
        let Some(volume) = self.volumes.get(&mount.volume) else {
            return refuse("volume is not Bidirectional");
        };
        if !plain(&mount.path) {
            return refuse("invalid path: not a plain path below the volume");
        }
        let request = ExportRequest {
            volume,
            share_path: mount.volume.clone(),
            path: mount.path.clone(),
            read_only: mount.read_only,
        };
        let target = HostMounter::target(&request);
        // By name only: a lookup would send a request to the guest.
        let mut others = self.exports.values();
        if others.any(|export| target.starts_with(&export.target)) {
            return refuse("another exported mount contains this path");
        }
        let mounted = self.mounter.mount(request).await?;
        match Pump::start(&self.session, id, &mounted, self.died.0.clone()) {
            Ok(pump) => {
                tracing::info!(target = %target.display(), "exported mount");
                let export = Export {
                    target,
                    mounted,
                    pump,
                };
                self.exports.insert(id, export);
                Ok(())
            }
            Err(error) => {
                self.mounter.unmount(mounted).await?;
                Err(error)
            }
        }
    }

    async fn withdraw(&mut self, id: u64) {
        let Some(export) = self.exports.remove(&id) else {
            return;
        };
        export.pump.stop().await;
        if let Err(error) = self.mounter.unmount(export.mounted).await {
            let target = export.target.display();
            tracing::warn!(%target, %error, "failed to unmount exported mount");
        }
    }
}

/// Reports whether `path` is relative and made of plain names only.
fn plain(path: &str) -> bool {
    let names = path.split('/');
    let is_name = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
    path.len() <= MAX_PATH_BYTES && names.into_iter().all(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_accepts_only_relative_names() {
        for valid in ["a", "a/b c", "…/x"] {
            assert!(plain(valid), "{valid:?}");
        }
        for invalid in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".", "a\0"] {
            assert!(!plain(invalid), "{invalid:?}");
        }
        assert!(!plain(&"x".repeat(MAX_PATH_BYTES + 1)));
    }
}
