//! [`Shown`]: mounts that containers make below volumes with propagation Bidirectional, shown on the host by FUSE.
//!
//! Follows the guest's list and does as it says, within what [`Volumes`] allows: [`place`] mounts, [`pump`] carries the
//! files' messages. What happens in the mount table of a container is the agent's to know.
//!
//! ```text
//! guest's list ─► path checked ─► FUSE mounted on the host, hidden in the share ─► messages pumped ─► acknowledged
//! ```
//! A mount goes when it leaves the list, when its container or the VM ends; a shim that was killed leaves dead ones, which
//! the action `delete` sweeps.

pub mod place;
mod pump;
pub mod volumes;

use boxlite_portal::{GuestSession, PortalError};
use boxlite_proto::boxlite::v1::{ShownMount, ShownRequest, ShownResponse};
use boxlite_sys::report::Report;
use place::{Keeper, Mounted, Wanted};
use pump::Pump;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use volumes::Volumes;

/// Mounts of one guest on the host; the agent lists no more.
const LIMIT: usize = 64;
/// Longest path below a volume, in bytes.
const PATH_LIMIT: usize = 1024;
/// Pause before a stream that broke is asked for again.
const PAUSE: Duration = Duration::from_secs(1);
/// Acknowledgements that wait for the guest.
const QUEUE: usize = 4;
/// How often a mount is made anew whose connection broke: a VM that stood still for long is no reason to give it up, a guest
/// that hangs up again and again is.
const REVIVALS: u32 = 3;

/// One mount on the host.
struct Export {
    target: PathBuf,
    mounted: Mounted,
    pump: Pump,
}

/// See the module.
pub struct Shown {
    session: GuestSession,
    keeper: Keeper,
    volumes: Arc<Volumes>,
    exports: BTreeMap<u64, Export>,
    /// The last list.
    listed: BTreeMap<u64, ShownMount>,
    /// What could not be shown, told once.
    refused: BTreeSet<u64>,
    /// How often a mount's connection broke.
    deaths: BTreeMap<u64, u32>,
    died: (mpsc::Sender<u64>, mpsc::Receiver<u64>),
}

impl Shown {
    /// For one guest.
    pub fn new(session: &GuestSession, keeper: Keeper, volumes: Arc<Volumes>) -> Self {
        Self {
            session: session.clone(),
            keeper,
            volumes,
            exports: BTreeMap::new(),
            listed: BTreeMap::new(),
            refused: BTreeSet::new(),
            deaths: BTreeMap::new(),
            died: mpsc::channel(LIMIT),
        }
    }

    /// Follows the guest's list until `ended`; then no mount is left. Its owner is the shim's task tracker.
    pub async fn run(mut self, ended: CancellationToken) {
        tokio::select! {
            () = self.volumes.wanted() => {}
            () = ended.cancelled() => return,
        }
        // The list is followed as long as the VM lives: a connection of its own.
        self.session = self.session.dedicated();
        while !ended.is_cancelled() {
            if let Err(error) = self.until_broken(&ended).await {
                tracing::debug!(error = %Report(&error), "the guest's list of mounts broke; asking again");
            }
            self.volumes.set_followed(false);
            self.pause(&ended).await;
        }
        let all: Vec<u64> = self.exports.keys().copied().collect();
        for id in all {
            self.withdraw(id).await;
        }
        if let Err(error) = self.keeper.sweep().await {
            tracing::warn!(%error, "mounts of the guest may be left");
        }
    }

    /// Before the list is asked for again; mounts that break meanwhile go.
    async fn pause(&mut self, ended: &CancellationToken) {
        let over = tokio::time::sleep(PAUSE);
        tokio::pin!(over);
        loop {
            tokio::select! {
                () = &mut over => return,
                Some(id) = self.died.1.recv() => self.withdraw(id).await,
                () = ended.cancelled() => return,
            }
        }
    }

    async fn until_broken(&mut self, ended: &CancellationToken) -> Result<(), PortalError> {
        let (acknowledge, requests) = mpsc::channel(QUEUE);
        let mounts = self.session.mounts();
        let opening = mounts.shown(ReceiverStream::new(requests));
        tokio::pin!(opening);
        let mut lists: Streaming<ShownResponse> = loop {
            tokio::select! {
                opened = &mut opening => break opened?,
                // A guest that does not answer must not hold up those who read its mount. It is shown again with the list.
                Some(id) = self.died.1.recv() => self.withdraw(id).await,
                () = ended.cancelled() => return Ok(()),
            }
        };
        self.volumes.set_followed(true);
        // The guest is back: what it did before it was gone counts no more.
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
            let list = list.map_err(|status| PortalError::from_status("Mounts.Shown", status))?;
            let Some(list) = list else {
                return Ok(());
            };
            let generation = list.generation;
            // To its end, whatever happens: nothing may be mounted that nobody knows of.
            self.follow(list).await;
            if acknowledge.send(ShownRequest { generation }).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Makes the host as the list is.
    async fn follow(&mut self, list: ShownResponse) {
        self.listed = list
            .mounts
            .into_iter()
            .take(LIMIT)
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
            self.try_show(id, &mount).await;
        }
    }

    async fn try_show(&mut self, id: u64, mount: &ShownMount) {
        if let Err(error) = self.show(id, mount).await {
            tracing::warn!(
                container = mount.container_id, path = mount.path, %error,
                "a mount of the guest is not shown on the host"
            );
            self.refused.insert(id);
        }
    }

    /// Makes a mount anew whose connection broke.
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
        if *deaths > REVIVALS {
            self.refused.insert(id);
            return;
        }
        self.try_show(id, &mount).await;
    }

    async fn show(&mut self, id: u64, mount: &ShownMount) -> std::io::Result<()> {
        let refuse = |reason: &str| Err(std::io::Error::other(reason.to_owned()));
        let Some(volume) = self.volumes.get(&mount.volume) else {
            return refuse("its volume is not Bidirectional");
        };
        if !plain(&mount.path) {
            return refuse("it is not a plain path below the volume");
        }
        let wanted = Wanted {
            volume,
            place: mount.volume.clone(),
            path: mount.path.clone(),
            read_only: mount.read_only,
        };
        let target = Keeper::describe(&wanted);
        // Looking for it would be a question to the guest.
        let mut others = self.exports.values();
        if others.any(|export| target.starts_with(&export.target)) {
            return refuse("another mount of the guest is there");
        }
        let mounted = self.keeper.mount(wanted).await?;
        match Pump::begin(&self.session, id, &mounted, self.died.0.clone()) {
            Ok(pump) => {
                tracing::info!(target = %target.display(), "shows a mount of the guest");
                let export = Export {
                    target,
                    mounted,
                    pump,
                };
                self.exports.insert(id, export);
                Ok(())
            }
            Err(error) => {
                self.keeper.unmount(mounted).await?;
                Err(error)
            }
        }
    }

    async fn withdraw(&mut self, id: u64) {
        let Some(export) = self.exports.remove(&id) else {
            return;
        };
        export.pump.end().await;
        if let Err(error) = self.keeper.unmount(export.mounted).await {
            let target = export.target.display();
            tracing::warn!(%target, %error, "a mount of the guest is left");
        }
    }
}

/// Whether it is a relative path of names only.
fn plain(path: &str) -> bool {
    let names = path.split('/');
    let good = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('\0');
    path.len() <= PATH_LIMIT && names.into_iter().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_names_only() {
        for good in ["a", "a/b c", "…/x"] {
            assert!(plain(good), "{good:?}");
        }
        for bad in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".", "a\0"] {
            assert!(!plain(bad), "{bad:?}");
        }
        assert!(!plain(&"x".repeat(PATH_LIMIT + 1)));
    }
}
