//! Exports mounts that containers make below Bidirectional volumes to the host: [`ExportList`].
//!
//! The host's kernel cannot mount a file system of the guest's kernel, so the guest serves it over FUSE. This module
//! keeps the list of exported mounts; [`watcher`] fills it, [`table`] parses a container's mount table, and
//! [`server`] answers FUSE requests. The host checks paths, mounts and unmounts; host paths are unknown here.
//!
//! ```text
//! mount table changes ─► watcher clones the tree ─► list ─► host mounts FUSE ─► acknowledged ─► exec's exit is reported
//! ```

pub(crate) mod server;
pub(crate) mod table;
pub(crate) mod watcher;

use boxlite_proto::boxlite::v1::{ExportedMount, WatchExportsResponse};
use boxlite_sys::sync::Mutex;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;
use table::FoundMount;
use tokio::sync::Notify;

/// Maximum number of mounts a pod exports at a time; each costs the host a connection.
const MAX_MOUNTS: usize = 64;
/// Maximum time an exec's exit is held back until the host has mirrored the mounts of the command.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Entry {
    container: String,
    found: FoundMount,
    tree: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct State {
    /// Incremented by every change.
    generation: u64,
    acknowledged: u64,
    readers: usize,
    last_id: u64,
    mounts: BTreeMap<u64, Entry>,
}

/// Mounts the pod exports, with the generation the host has acknowledged.
#[derive(Debug, Default)]
pub(crate) struct ExportList {
    state: Mutex<State>,
    changed: Notify,
    acknowledged: Notify,
}

impl ExportList {
    /// Returns the exported mounts of a container.
    pub(crate) fn of(&self, container: &str) -> Vec<FoundMount> {
        let state = self.lock();
        let entries = state.mounts.values();
        let own = entries.filter(|entry| entry.container == container);
        own.map(|entry| entry.found.clone()).collect()
    }

    /// Removes the mounts of a container for which `keep` returns false.
    pub(crate) fn retain(&self, container: &str, keep: impl Fn(&FoundMount) -> bool) {
        let mut state = self.lock();
        let before = state.mounts.len();
        state
            .mounts
            .retain(|_, entry| entry.container != container || keep(&entry.found));
        if state.mounts.len() != before {
            state.generation += 1;
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// Adds a mount, of which `tree` is a clone. Returns false if the limit is reached.
    pub(crate) fn add(&self, container: &str, found: FoundMount, tree: OwnedFd) -> bool {
        let mut state = self.lock();
        if state.mounts.len() >= MAX_MOUNTS {
            return false;
        }
        state.last_id += 1;
        state.generation += 1;
        let entry = Entry {
            container: container.to_owned(),
            found,
            tree: Arc::new(tree),
        };
        let id = state.last_id;
        state.mounts.insert(id, entry);
        drop(state);
        self.changed.notify_waiters();
        true
    }

    /// Returns the clone of a mount.
    pub(crate) fn tree(&self, id: u64) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.lock().mounts.get(&id)?.tree))
    }

    /// Returns the list once its generation differs from `after`, or immediately if `after` is `None`. Cancel-safe.
    pub(crate) async fn next(&self, after: Option<u64>) -> WatchExportsResponse {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let state = self.lock();
                if after != Some(state.generation) {
                    return list(&state);
                }
            }
            changed.await;
        }
    }

    /// Records that the host has mirrored the list of `generation`.
    pub(crate) fn acknowledge(&self, generation: u64) {
        let mut state = self.lock();
        state.acknowledged = state.acknowledged.max(generation.min(state.generation));
        drop(state);
        self.acknowledged.notify_waiters();
    }

    /// Waits until the host has mirrored the current list, for at most [`ACKNOWLEDGE_TIMEOUT`]. Returns immediately
    /// if the list has no readers.
    pub(crate) async fn wait_acknowledged(&self) {
        let target = self.lock().generation;
        let mirrored = async {
            loop {
                let acknowledged = self.acknowledged.notified();
                tokio::pin!(acknowledged);
                acknowledged.as_mut().enable();
                {
                    let state = self.lock();
                    if state.readers == 0 || state.acknowledged >= target {
                        return;
                    }
                }
                acknowledged.await;
            }
        };
        if tokio::time::timeout(ACKNOWLEDGE_TIMEOUT, mirrored)
            .await
            .is_err()
        {
            tracing::warn!("host did not mirror the exported mounts in time");
        }
    }

    /// Registers a reader of the list for the lifetime of the returned value.
    pub(crate) fn reader(self: &Arc<Self>) -> Reader {
        self.lock().readers += 1;
        Reader(Arc::clone(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

fn list(state: &State) -> WatchExportsResponse {
    let mounts = state.mounts.iter().map(|(id, entry)| ExportedMount {
        id: *id,
        container_id: entry.container.clone(),
        volume: entry.found.share_path.clone(),
        path: entry.found.path.clone(),
        read_only: entry.found.read_only,
    });
    WatchExportsResponse {
        generation: state.generation,
        mounts: mounts.collect(),
    }
}

/// Registration made by [`ExportList::reader`].
#[derive(Debug)]
pub(crate) struct Reader(Arc<ExportList>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.lock().readers -= 1;
        self.0.acknowledged.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str) -> FoundMount {
        FoundMount {
            mount: 7,
            origin: "0:1 /".into(),
            point: format!("/vol/{path}").into(),
            share_path: "m/abc".into(),
            path: path.into(),
            read_only: false,
        }
    }

    fn tree() -> OwnedFd {
        std::fs::File::open("/").unwrap().into()
    }

    #[tokio::test]
    async fn export_list_with_reader_waits_for_acknowledgement() {
        let exports = Arc::new(ExportList::default());
        assert_eq!(exports.next(None).await.generation, 0);
        assert!(exports.add("c", found("a"), tree()));
        // Without a reader there is nothing to wait for.
        exports.wait_acknowledged().await;
        let reader = exports.reader();
        let list = exports.next(Some(0)).await;
        assert_eq!((list.generation, list.mounts.len()), (1, 1));
        assert_eq!(list.mounts[0].path, "a");
        let waiting = exports.wait_acknowledged();
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        exports.acknowledge(1);
        waiting.await;
        assert_eq!(exports.of("c"), [found("a")]);
        exports.retain("other", |_| false);
        assert_eq!(exports.next(None).await.generation, 1);
        exports.retain("c", |_| false);
        assert!(exports.next(Some(1)).await.mounts.is_empty());
        let waiting = exports.wait_acknowledged();
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        drop(reader);
        waiting.await;
    }

    #[test]
    fn add_above_limit_returns_false() {
        let exports = ExportList::default();
        for number in 0..MAX_MOUNTS {
            assert!(exports.add("c", found(&number.to_string()), tree()));
        }
        assert!(!exports.add("c", found("more"), tree()));
    }
}
