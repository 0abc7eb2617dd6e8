//! [`Shown`]: mounts that containers make below volumes with propagation Bidirectional, which the host shows, too.
//!
//! A mount of this kernel is nothing that the host's kernel could mount, so it is served to it by FUSE. This keeps the list;
//! [`watch`] finds what goes into it, [`table`] reads a container's mount table, [`server`] answers the host's requests.
//! The host mounts, checks paths and takes away; nothing here knows a path of the host.
//!
//! ```text
//! mount table changes ─► watch: the tree is cloned ─► the list ─► host mounts FUSE ─► acknowledged ─► the command has ended
//! ```

pub mod server;
pub mod table;
pub mod watch;

use boxlite_proto::boxlite::v1::{ShownMount, ShownResponse};
use boxlite_sys::sync::Mutex;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;
use table::Found;
use tokio::sync::Notify;

/// Mounts of the pod that are shown at one time; each costs the host a connection.
const LIMIT: usize = 64;
/// How long the end of a command waits for the host to show what the command mounted.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Entry {
    container: String,
    found: Found,
    tree: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct State {
    /// Counts changes.
    generation: u64,
    acknowledged: u64,
    readers: usize,
    last_id: u64,
    mounts: BTreeMap<u64, Entry>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Shown {
    state: Mutex<State>,
    changed: Notify,
    acknowledged: Notify,
}

impl Shown {
    /// What is shown of a container.
    pub fn of(&self, container: &str) -> Vec<Found> {
        let state = self.lock();
        let entries = state.mounts.values();
        let own = entries.filter(|entry| entry.container == container);
        own.map(|entry| entry.found.clone()).collect()
    }

    /// Takes away what of a container `keep` does not want.
    pub fn retain(&self, container: &str, keep: impl Fn(&Found) -> bool) {
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

    /// Adds a mount; `tree` is a clone of it. False: there are too many.
    pub fn add(&self, container: &str, found: Found, tree: OwnedFd) -> bool {
        let mut state = self.lock();
        if state.mounts.len() >= LIMIT {
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

    /// The clone of a mount.
    pub fn tree(&self, id: u64) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.lock().mounts.get(&id)?.tree))
    }

    /// The list, once it is another than that of generation `after`; at once without one. Safe to drop.
    pub async fn next(&self, after: Option<u64>) -> ShownResponse {
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

    /// The host shows what the list of that generation has.
    pub fn acknowledge(&self, generation: u64) {
        let mut state = self.lock();
        state.acknowledged = state.acknowledged.max(generation.min(state.generation));
        drop(state);
        self.acknowledged.notify_waiters();
    }

    /// Waits until the host shows what is listed now, at most [`SETTLE_LIMIT`]; not at all where nobody reads the list.
    pub async fn settled(&self) {
        let wanted = self.lock().generation;
        let settled = async {
            loop {
                let acknowledged = self.acknowledged.notified();
                tokio::pin!(acknowledged);
                acknowledged.as_mut().enable();
                {
                    let state = self.lock();
                    if state.readers == 0 || state.acknowledged >= wanted {
                        return;
                    }
                }
                acknowledged.await;
            }
        };
        if tokio::time::timeout(SETTLE_LIMIT, settled).await.is_err() {
            tracing::warn!("the host does not show the mounts of a container");
        }
    }

    /// Counts a reader of the list as long as the value lives.
    pub fn reader(self: &Arc<Self>) -> Reader {
        self.lock().readers += 1;
        Reader(Arc::clone(self))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

fn list(state: &State) -> ShownResponse {
    let mounts = state.mounts.iter().map(|(id, entry)| ShownMount {
        id: *id,
        container_id: entry.container.clone(),
        volume: entry.found.place.clone(),
        path: entry.found.path.clone(),
        read_only: entry.found.read_only,
    });
    ShownResponse {
        generation: state.generation,
        mounts: mounts.collect(),
    }
}

/// See [`Shown::reader`].
#[derive(Debug)]
pub struct Reader(Arc<Shown>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.lock().readers -= 1;
        self.0.acknowledged.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str) -> Found {
        Found {
            mount: 7,
            what: "0:1 /".into(),
            point: format!("/vol/{path}").into(),
            place: "m/abc".into(),
            path: path.into(),
            read_only: false,
        }
    }

    fn tree() -> OwnedFd {
        std::fs::File::open("/").unwrap().into()
    }

    #[tokio::test]
    async fn readers_get_whole_lists_and_ends_wait_for_them() {
        let shown = Arc::new(Shown::default());
        assert_eq!(shown.next(None).await.generation, 0);
        assert!(shown.add("c", found("a"), tree()));
        // Nobody reads: nobody is waited for.
        shown.settled().await;
        let reader = shown.reader();
        let list = shown.next(Some(0)).await;
        assert_eq!((list.generation, list.mounts.len()), (1, 1));
        assert_eq!(list.mounts[0].path, "a");
        let settled = shown.settled();
        tokio::pin!(settled);
        assert!(futures::poll!(&mut settled).is_pending());
        shown.acknowledge(1);
        settled.await;
        assert_eq!(shown.of("c"), [found("a")]);
        shown.retain("other", |_| false);
        assert_eq!(shown.next(None).await.generation, 1);
        shown.retain("c", |_| false);
        assert!(shown.next(Some(1)).await.mounts.is_empty());
        let settled = shown.settled();
        tokio::pin!(settled);
        assert!(futures::poll!(&mut settled).is_pending());
        drop(reader);
        settled.await;
    }

    #[test]
    fn there_is_a_limit() {
        let shown = Shown::default();
        for number in 0..LIMIT {
            assert!(shown.add("c", found(&number.to_string()), tree()));
        }
        assert!(!shown.add("c", found("more"), tree()));
    }
}
