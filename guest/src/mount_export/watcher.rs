//! [`MountWatcher`]: keeps the [`ExportList`] in sync with one container's mount table.
//!
//! An exported mount is a clone made in the container's mount namespace, so that the container can unmount its own
//! without EBUSY. Mounts below it are cloned in their state at that time.

use super::ExportList;
use super::table::{self, BidirectionalVolume, FoundMount, MountedVolume};
use crate::descriptor::AsyncDescriptor;
use crate::execution::Process;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Maximum number of bytes read of a mount table; mounts beyond are not exported.
const MAX_TABLE_BYTES: u64 = 1 << 20;
/// Timeout of cloning one mount. Cloning queries no file system that could hang except the volume itself.
const CLONE_TIMEOUT: Duration = Duration::from_secs(5);

/// Watcher of one container's mounts.
#[derive(Debug)]
pub(crate) struct MountWatcher {
    container: String,
    pid: i32,
    namespace: Arc<File>,
    volumes: Vec<MountedVolume>,
    /// IDs of the mounts present at the start.
    initial: HashSet<u64>,
    exports: Arc<ExportList>,
    /// Serializes synchronizations.
    state: tokio::sync::Mutex<WatchState>,
}

#[derive(Debug, Default)]
struct WatchState {
    /// The container has ended; none of its mounts are exported any more.
    ended: bool,
    /// Mounts that could not be exported; each is logged once.
    refused: HashSet<FoundMount>,
}

impl MountWatcher {
    /// Creates the watcher of a container whose init process `pid` has its mounts but has not been started.
    ///
    /// # Errors
    /// If the process has ended.
    pub(crate) fn new(
        container: &str,
        pid: i32,
        volumes: Vec<BidirectionalVolume>,
        exports: Arc<ExportList>,
    ) -> io::Result<Self> {
        let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
        let (volumes, initial) = table::volumes(&read(pid)?, volumes);
        Ok(Self {
            container: container.to_owned(),
            pid,
            namespace: Arc::new(namespace),
            volumes,
            initial,
            exports,
            state: tokio::sync::Mutex::default(),
        })
    }

    /// Watches until `init` ends, then removes all mounts of the container from the list. Runs in the agent's task
    /// tracker.
    pub(crate) async fn run(&self, init: &Process) {
        tokio::select! {
            result = self.follow() => {
                if let Err(error) = result {
                    tracing::warn!(container = self.container, %error, "failed to watch the container's mounts");
                    init.wait().await;
                }
            }
            _ = init.wait() => {}
        }
        self.state.lock().await.ended = true;
        self.exports.retain(&self.container, |_| false);
    }

    async fn follow(&self) -> io::Result<()> {
        let file = File::open(format!("/proc/{}/mountinfo", self.pid))?;
        // The kernel counts changes per descriptor from its opening on, so none is missed between two reads.
        let table = AsyncDescriptor::notifying(file.into())?;
        loop {
            self.sync().await;
            table.changed().await?;
        }
    }

    /// Synchronizes the list and waits until the host has mirrored it. Called at the end of each exec in the
    /// container.
    pub(crate) async fn sync_and_wait(&self) {
        self.sync().await;
        self.exports.wait_acknowledged().await;
    }

    /// Synchronizes the list with the mount table. If the future is dropped, the next call completes the work.
    async fn sync(&self) {
        let mut state = self.state.lock().await;
        if state.ended {
            return;
        }
        let Ok(text) = read(self.pid) else {
            return;
        };
        let present = table::find(&text, &self.volumes, &self.initial);
        self.exports
            .retain(&self.container, |found| present.contains(found));
        state.refused.retain(|found| present.contains(found));
        let known = self.exports.of(&self.container);
        for found in present {
            if known.contains(&found) || state.refused.contains(&found) {
                continue;
            }
            let result = match self.clone_tree(&found).await {
                Ok(tree) => match self.exports.add(&self.container, found.clone(), tree) {
                    true => Ok(()),
                    false => Err(io::Error::other("too many exported mounts")),
                },
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                let point = found.point.display();
                tracing::warn!(container = self.container, %point, %error, "failed to export mount");
                state.refused.insert(found);
            }
        }
    }

    /// Clones the mount in a thread that enters the container's mount namespace and then ends.
    async fn clone_tree(&self, found: &FoundMount) -> io::Result<OwnedFd> {
        let (done, result) = tokio::sync::oneshot::channel();
        let (namespace, found) = (Arc::clone(&self.namespace), found.clone());
        // Not joined: a mount that hangs blocks it beyond the timeout, until the VM ends.
        std::thread::Builder::new()
            .name("clone mount".to_owned())
            .spawn(move || drop(done.send(clone_tree(&namespace, &found))))?;
        match tokio::time::timeout(CLONE_TIMEOUT, result).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(io::Error::other("clone thread panicked")),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// Reads at most [`MAX_TABLE_BYTES`] of a process's mount table.
fn read(pid: i32) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/mountinfo"))?
        .take(MAX_TABLE_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Clones the mount. Blocks, and leaves the calling thread in the container's mount namespace.
fn clone_tree(namespace: &File, found: &FoundMount) -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    let root = File::open("/")?;
    let path = found.point.strip_prefix("/").unwrap_or(Path::new("."));
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mount_point = openat2(&root, path, flags, Mode::empty(), resolve)?;
    // Does not query the file system, which may never answer.
    let how = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let facts = statx(&mount_point, "", how, StatxFlags::TYPE | StatxFlags::MNT_ID)?;
    if facts.stx_mnt_id != found.mount {
        return Err(io::Error::other("mount was replaced meanwhile"));
    }
    if FileType::from_raw_mode(facts.stx_mode.into()) != FileType::Directory {
        return Err(io::Error::other("only directories can be exported"));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(&mount_point, "", flags)?)
}
