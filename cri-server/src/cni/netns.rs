//! Network namespaces without processes: created by a short-lived thread, kept alive by a bind mount, removed with it.
//!
//! They outlive the daemon. The machine's namespace is not changed: the thread that unshares ends at once.

use super::CniError;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{FsType, statfs};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// `NSFS_MAGIC` of linux/magic.h: file system type of namespace files.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
/// Index of the loopback device: the first one of every new namespace.
const LOOPBACK: u32 = 1;
/// Maximum number of mounts stacked on one name that `remove` unmounts. A retry after a crash can add to the usual one.
const MAX_STACKED_MOUNTS: usize = 16;

/// Returns true if a namespace is mounted at `path`.
pub(crate) fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC)
}

/// Returns the names of the directory's entries: namespaces, or files of an interrupted creation.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

/// Creates a namespace at `path` with its loopback up. On failure nothing remains. A dropped future lets the thread finish.
pub(crate) async fn create(path: PathBuf) -> Result<(), CniError> {
    off_thread(path, |path| {
        let made = prepare(path).and_then(|()| {
            // The namespace of a thread ends with it, unless mounted: hence a separate thread, joined here.
            std::thread::scope(|scope| {
                scope
                    .spawn(|| fill(path))
                    .join()
                    .unwrap_or_else(|_| Err(("run the thread of", io::Error::other("panicked"))))
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
        Err(join) => ("run the task of", io::Error::other(join)),
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
            .map_err(|error| ("create the directory of", error))?;
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o400)
        .open(path)
        .map(drop)
        .map_err(|error| ("create the file of", error))
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
    // Sockets of this tokio runtime belong to the new namespace, which this thread has entered.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(|error| ("start the async runtime of", error))?;
    runtime
        .block_on(loopback_up())
        .map_err(|error| ("bring up the loopback of", error))
}

async fn loopback_up() -> io::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let request = rtnetlink::LinkUnspec::new_with_index(LOOPBACK).up().build();
    let set = handle.link().set(request).execute();
    // The connection owns the socket and ends with this select.
    tokio::select! {
        done = set => done.map_err(io::Error::other),
        () = connection => Err(io::Error::other("the netlink connection ended")),
    }
}

fn unmount(path: &Path) -> Step<()> {
    for _ in 0..MAX_STACKED_MOUNTS {
        if !is_namespace(path) {
            break;
        }
        umount2(path, MntFlags::MNT_DETACH).map_err(|errno| ("unmount", errno.into()))?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(("remove the file of", error)),
        _ => Ok(()),
    }
}
