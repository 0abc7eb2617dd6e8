//! The node's System V IPC objects, shown to a container that asked for the node's IPC namespace.
//!
//! A VM has a kernel of its own, so objects of this host can't be attached from within it. What can be had is the list of
//! them: a mount whose source is [`HOST`] gets a directory with copies of its files, kept up to date while the VM lives.
//! Copies, because a file of /proc has no size, and virtiofs reads no further than a file's size.

use super::spec::bind_source;
use crate::error::{Result, ShimError};
use oci_spec::runtime::{Mount, Spec};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What a spec names as the source.
pub const HOST: &str = "/proc/sysvipc";
/// Its files.
const FILES: [&str; 3] = ["msg", "sem", "shm"];
/// Name of the directory of copies, in the container's bundle.
const DIRECTORY: &str = "sysvipc";
/// Pause between two looks: as late as virtiofs shows a change anyway.
const PAUSE: Duration = Duration::from_secs(1);

/// Adds a mount of [`HOST`] unless the spec already mounts something there. A containerd expresses the node's IPC
/// namespace by the VM's pid, which means nothing to the guest; boxlite-cri adds this mount itself.
pub fn add_mount(spec: &mut Spec) {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    if mounts
        .iter()
        .any(|mount| mount.destination() == Path::new(HOST))
    {
        return;
    }
    let mut mount = Mount::default();
    let options = ["rbind", "rprivate", "ro"].map(str::to_owned);
    mount
        .set_destination(HOST.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(HOST.into()))
        .set_options(Some(options.to_vec()));
    mounts.push(mount);
    spec.set_mounts(Some(mounts));
}

/// Redirects the spec's mounts of [`HOST`] to copies in `bundle`, and keeps those up to date by a task that ends with the
/// VM (`ended`) or with the bundle. Nothing where the spec has none. Dropped midway, it leaves a directory in the bundle.
///
/// # Errors
/// Io, naming the directory.
pub async fn mirror(
    spec: &mut Spec,
    bundle: &Path,
    tasks: &TaskTracker,
    ended: &CancellationToken,
) -> Result<()> {
    let directory = bundle.join(DIRECTORY);
    let mut found = false;
    for mount in spec.mounts_mut().iter_mut().flatten() {
        if bind_source(mount) == Some(Path::new(HOST)) {
            mount.set_source(Some(directory.clone()));
            found = true;
        }
    }
    if !found {
        return Ok(());
    }
    let first = directory.clone();
    blocking(move || {
        std::fs::create_dir_all(&first)?;
        copy(&first)
    })
    .await
    .map_err(ShimError::io(
        "copy the node's IPC list to",
        directory.display(),
    ))?;
    tasks.spawn(refresh(directory, ended.clone()));
    Ok(())
}

async fn refresh(directory: PathBuf, ended: CancellationToken) {
    loop {
        tokio::select! {
            () = ended.cancelled() => return,
            () = tokio::time::sleep(PAUSE) => {}
        }
        let next = directory.clone();
        match blocking(move || copy(&next)).await {
            Ok(()) => {}
            // The container was removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => tracing::warn!(%error, "the node's IPC list is not up to date"),
        }
    }
}

async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(io::Error::other)?
}

/// Brings the copies up to date. A reader sees a file whole, the old one or the new one.
fn copy(directory: &Path) -> io::Result<()> {
    for name in FILES {
        let text = match std::fs::read(Path::new(HOST).join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            result => result?,
        };
        let target = directory.join(name);
        if std::fs::read(&target).is_ok_and(|present| present == text) {
            continue;
        }
        let draft = directory.join(format!(".{name}"));
        std::fs::write(&draft, text)?;
        std::fs::rename(&draft, &target)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[tokio::test]
    async fn only_the_nodes_list_is_redirected() {
        let bundle = tempfile::tempdir().expect("tempdir");
        let mut spec: Spec = serde_json::from_value(json!({"ociVersion": "1.1.0", "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/proc/sysvipc", "type": "bind", "source": HOST, "options": ["rbind", "ro"]},
        ]}))
        .expect("a spec");
        let (tasks, ended) = (TaskTracker::new(), CancellationToken::new());
        mirror(&mut spec, bundle.path(), &tasks, &ended)
            .await
            .expect("mirrored");
        let mounts = spec.mounts().clone().expect("mounts");
        let directory = bundle.path().join(DIRECTORY);
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        assert_eq!(mounts[1].source().as_deref(), Some(directory.as_path()));
        let copied = std::fs::read_to_string(directory.join("shm")).expect("copied");
        let host = std::fs::read_to_string("/proc/sysvipc/shm").expect("this host has it");
        assert_eq!(copied.lines().next(), host.lines().next());
        // Without its bundle the task has nothing to do any more.
        std::fs::remove_dir_all(&directory).expect("removed");
        tasks.close();
        tokio::time::timeout(Duration::from_secs(20), tasks.wait())
            .await
            .expect("the task ends");
    }

    #[test]
    fn add_mount_twice_adds_one_mount() {
        let spec = json!({"ociVersion": "1.0.2", "mounts": []});
        let mut spec: Spec = serde_json::from_value(spec).expect("a spec");
        add_mount(&mut spec);
        add_mount(&mut spec);
        assert_eq!(spec.mounts().as_ref().map(Vec::len), Some(1));
    }
}
