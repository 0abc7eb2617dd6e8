//! [`Watch`]: looks into one container's mount table whenever it changes, and keeps the list of [`Shown`] true to it.
//!
//! What is shown is a clone of the mount, made in the container's mount namespace, so that a container can unmount its own
//! without being told that it is busy. Mounts below a mount are cloned with it, as they are then.

use super::Shown;
use super::table::{self, Found, Volume, Wanted};
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

/// Most bytes of a mount table that are read; mounts beyond are not shown.
const TABLE_LIMIT: u64 = 1 << 20;
/// How long cloning one mount may take: it asks no file system anything that could hang, but the volume itself.
const CLONE_LIMIT: Duration = Duration::from_secs(5);

/// One container's.
#[derive(Debug)]
pub struct Watch {
    container: String,
    pid: i32,
    namespace: Arc<File>,
    volumes: Vec<Volume>,
    /// Mounts that it began with.
    first: HashSet<u64>,
    shown: Arc<Shown>,
    /// One look at a time.
    turn: tokio::sync::Mutex<Turn>,
}

#[derive(Debug, Default)]
struct Turn {
    /// The container has ended: nothing is shown of it any more.
    over: bool,
    /// What could not be shown, told once.
    refused: HashSet<Found>,
}

impl Watch {
    /// For the container whose init process `pid` has its mounts and has not been started.
    ///
    /// # Errors
    /// The process is gone.
    pub fn begin(
        container: &str,
        pid: i32,
        wanted: Vec<Wanted>,
        shown: Arc<Shown>,
    ) -> io::Result<Self> {
        let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
        let (volumes, first) = table::volumes(&read(pid)?, wanted);
        Ok(Self {
            container: container.to_owned(),
            pid,
            namespace: Arc::new(namespace),
            volumes,
            first,
            shown,
            turn: tokio::sync::Mutex::default(),
        })
    }

    /// Watches until `init` has ended; then nothing of the container is shown. Its owner is the agent's tracker.
    pub async fn run(&self, init: &Process) {
        tokio::select! {
            result = self.follow() => {
                if let Err(error) = result {
                    tracing::warn!(container = self.container, %error, "mounts are not watched");
                    init.wait().await;
                }
            }
            _ = init.wait() => {}
        }
        self.turn.lock().await.over = true;
        self.shown.retain(&self.container, |_| false);
    }

    async fn follow(&self) -> io::Result<()> {
        let file = File::open(format!("/proc/{}/mountinfo", self.pid))?;
        // The kernel counts changes for this descriptor from its opening on: none falls between two looks.
        let table = AsyncDescriptor::notifying(file.into())?;
        loop {
            self.look().await;
            table.changed().await?;
        }
    }

    /// Looks now, and waits until the host shows what there is: at the end of each command in the container.
    pub async fn settle(&self) {
        self.look().await;
        self.shown.settled().await;
    }

    /// Dropped, it leaves the list as far as it came; the next look goes on.
    async fn look(&self) {
        let mut turn = self.turn.lock().await;
        if turn.over {
            return;
        }
        let Ok(text) = read(self.pid) else {
            return;
        };
        let present = table::find(&text, &self.volumes, &self.first);
        self.shown
            .retain(&self.container, |found| present.contains(found));
        turn.refused.retain(|found| present.contains(found));
        let known = self.shown.of(&self.container);
        for found in present {
            if known.contains(&found) || turn.refused.contains(&found) {
                continue;
            }
            let shown = match self.clone_tree(&found).await {
                Ok(tree) => match self.shown.add(&self.container, found.clone(), tree) {
                    true => Ok(()),
                    false => Err(io::Error::other("there are too many")),
                },
                Err(error) => Err(error),
            };
            if let Err(error) = shown {
                let point = found.point.display();
                tracing::warn!(container = self.container, %point, %error, "the host does not show this mount");
                turn.refused.insert(found);
            }
        }
    }

    /// On a thread of its own, which enters the container's mount namespace and ends.
    async fn clone_tree(&self, found: &Found) -> io::Result<OwnedFd> {
        let (done, result) = tokio::sync::oneshot::channel();
        let (namespace, found) = (Arc::clone(&self.namespace), found.clone());
        std::thread::Builder::new()
            .name("clone mount".to_owned())
            .spawn(move || drop(done.send(clone_tree(&namespace, &found))))?;
        match tokio::time::timeout(CLONE_LIMIT, result).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(io::Error::other("the thread is gone")),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// The table of a process, as far as it is looked at.
fn read(pid: i32) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/mountinfo"))?
        .take(TABLE_LIMIT)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Blocks, and leaves the calling thread in the container's mount namespace.
fn clone_tree(namespace: &File, found: &Found) -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    let root = File::open("/")?;
    let path = found.point.strip_prefix("/").unwrap_or(Path::new("."));
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let place = openat2(&root, path, flags, Mode::empty(), resolve)?;
    // Without asking the file system, which may be one that never answers.
    let how = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let facts = statx(&place, "", how, StatxFlags::TYPE | StatxFlags::MNT_ID)?;
    if facts.stx_mnt_id != found.mount {
        return Err(io::Error::other("something else is there by now"));
    }
    if FileType::from_raw_mode(facts.stx_mode.into()) != FileType::Directory {
        return Err(io::Error::other("only directories can be shown"));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    Ok(open_tree(&place, "", flags)?)
}
