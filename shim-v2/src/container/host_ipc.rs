//! The list of the node's System V IPC objects, for containers in the node's IPC namespace.
//!
//! The guest runs another kernel, so a container cannot attach the host's objects, but it can list them: a mount whose
//! source is [`HOST`] is redirected to a directory with copies of the files, refreshed while the VM runs. Copies are needed
//! because files in /proc have size 0 and virtiofs reads no further than a file's size.

use super::spec::bind_source;
use crate::error::{Result, ShimError};
use oci_spec::runtime::{Mount, Spec};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Mount source that selects the list.
pub const HOST: &str = "/proc/sysvipc";
/// Names of the files in [`HOST`].
const FILES: [&str; 3] = ["msg", "sem", "shm"];
/// Directory of the copies in the container's bundle.
const DIRECTORY: &str = "sysvipc";
/// Interval between refreshes. The guest's cache shows changes no sooner.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);

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

/// Redirects the spec's mounts of [`HOST`] to copies in `bundle` and spawns a task that refreshes them until the VM ends
/// (`ended`) or the bundle is removed. Does nothing if the spec has no such mount. If dropped midway, a directory may
/// remain in the bundle.
///
/// # Errors
/// Io with the directory's path.
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
            () = tokio::time::sleep(REFRESH_INTERVAL) => {}
        }
        let next = directory.clone();
        match blocking(move || copy(&next)).await {
            Ok(()) => {}
            // The container was removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => tracing::warn!(%error, "failed to refresh the node's IPC list"),
        }
    }
}

async fn blocking(job: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    tokio::task::spawn_blocking(job)
        .await
        .map_err(io::Error::other)?
}

/// Refreshes the copies. Each file is replaced atomically.
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
    async fn mirror_redirects_only_mounts_of_sysvipc() {
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
        let host = std::fs::read_to_string("/proc/sysvipc/shm").expect("this host has SysV IPC");
        assert_eq!(copied.lines().next(), host.lines().next());
        // The task ends once the bundle is gone.
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
