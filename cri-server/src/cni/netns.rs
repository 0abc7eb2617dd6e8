//! Network namespaces without processes: created by a short-lived thread, held by a bind mount, removed with it.
//!
//! They survive the daemon's death. The machine's own namespace is never touched: the thread that unshares ends at once.

use super::CniError;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{FsType, statfs};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// `NSFS_MAGIC` of linux/magic.h: the file system of a namespace's file.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
/// Index of the loopback device: the first one of every new namespace.
const LOOPBACK: u32 = 1;
/// Most mounts stacked on one name that `remove` takes off. One is normal; more come from a retry after a crash.
const STACK_LIMIT: usize = 16;

/// Returns true if a namespace is mounted at `path`.
pub(crate) fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC)
}

/// Returns the names of the directory's entries, namespaces or left-over files.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

/// Makes a namespace at `path` with its loopback up. On failure nothing remains. A dropped future lets the thread finish.
pub(crate) async fn create(path: PathBuf) -> Result<(), CniError> {
    off_thread(path, |path| {
        let made = prepare(path).and_then(|()| {
            // The namespace of a thread ends with it, unless mounted: hence a separate thread, joined here.
            std::thread::scope(|scope| {
                scope
                    .spawn(|| fill(path))
                    .join()
                    .unwrap_or_else(|_| Err(("its thread", io::Error::other("panicked"))))
            })
        });
        made.inspect_err(|_| {
            let _ = unmount(path);
        })
    })
    .await
}

/// Unmounts and removes `path`. Succeeds if it does not exist.
pub(crate) async fn remove(path: PathBuf) -> Result<(), CniError> {
    off_thread(path, unmount).await
}

type Step<T> = Result<T, (&'static str, io::Error)>;

async fn off_thread(
    path: PathBuf,
    work: impl FnOnce(&Path) -> Step<()> + Send + 'static,
) -> Result<(), CniError> {
    let name = path.clone();
    let done = tokio::task::spawn_blocking(move || work(&path)).await;
    let (step, source) = match done {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(failure)) => failure,
        Err(join) => ("its task", io::Error::other(join)),
    };
    Err(CniError::Namespace {
        path: name,
        step,
        source,
    })
}

fn prepare(path: &Path) -> Step<()> {
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|error| ("making its directory", error))?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)
        .map(drop)
        .map_err(|error| ("creating its file", error))
}

fn fill(path: &Path) -> Step<()> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| ("unshare", errno.into()))?;
    mount(
        Some("/proc/thread-self/ns/net"),
        path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(|errno| ("mount", errno.into()))?;
    // The sockets of this runtime are opened in the new namespace, by the thread that is in it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|error| ("starting its runtime", error))?;
    runtime
        .block_on(loopback_up())
        .map_err(|error| ("bringing its loopback up", error))
}

async fn loopback_up() -> io::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let request = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
    let set = handle.link().set(request).execute();
    // The connection is the owner of the socket and ends when this select does.
    tokio::select! {
        done = set => done.map_err(io::Error::other),
        () = connection => Err(io::Error::other("the netlink connection ended")),
    }
}

fn unmount(path: &Path) -> Step<()> {
    for _ in 0..STACK_LIMIT {
        if !is_namespace(path) {
            break;
        }
        umount2(path, MntFlags::MNT_DETACH).map_err(|errno| ("unmount", errno.into()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(("removing its file", error)),
        _ => Ok(()),
    }
}
