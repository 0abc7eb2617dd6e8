//! A container's root file system in the share: EROFS layers in `l/`, any other mount at `r/<container id>`.
//! [`super::snapshot`] interprets the mounts of containerd's snapshotters.
//!
//! Containers of a pod share layers, which [`SharedBinds`] reference-counts. The guest stacks the layers.

use super::snapshot;
use crate::error::{Result, ShimError};
use crate::pod::Share;
use crate::pod::undo::Undo;
use crate::share::{Access, BindMode};
use boxlite_proto::boxlite::v1::{Layer, Rootfs};
use containerd_shim_protos::api::Mount;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Mutex;

/// Maximum layers of an image: overlayfs accepts 500 lower directories.
const MAX_LAYERS: usize = 500;

/// Reference counts of share paths that several containers use (layer files, volumes). The async lock is held during a
/// bind, so that a second user waits for it.
#[derive(Clone, Default)]
pub struct SharedBinds(Arc<Mutex<HashMap<String, usize>>>);

impl SharedBinds {
    async fn take(&self, share: &Arc<dyn Share>, source: &Path, undo: &mut Undo) -> Result<String> {
        let path = layer_path(source);
        let mode = BindMode::fixed(Access::ReadOnly);
        self.bind(share, source, &path, mode, undo).await?;
        Ok(path)
    }

    /// Binds `source` at `path` of the share for one more user. `undo` releases it.
    ///
    /// # Errors
    /// The share's error; nothing remains bound then.
    pub async fn bind(
        &self,
        share: &Arc<dyn Share>,
        source: &Path,
        path: &str,
        mode: BindMode,
        undo: &mut Undo,
    ) -> Result<()> {
        let mut users = self.0.lock().await;
        if let Some(count) = users.get_mut(path) {
            *count += 1;
        } else {
            share.bind(source, path, mode).await?;
            users.insert(path.to_owned(), 1);
        }
        drop(users);
        let (layers, share, key) = (self.clone(), share.clone(), path.to_owned());
        undo.push("bind mount", move || async move {
            layers.release(&share, &key).await
        });
        Ok(())
    }

    async fn release(&self, share: &Arc<dyn Share>, path: &str) -> Result<()> {
        let mut users = self.0.lock().await;
        match users.get_mut(path) {
            Some(count) if *count > 1 => {
                *count -= 1;
                Ok(())
            }
            Some(_) => {
                users.remove(path);
                share.unbind(path).await
            }
            None => Ok(()),
        }
    }
}

/// Returns the share path of a layer file, derived from a digest of its host path, so that each file appears once.
pub(super) fn layer_path(source: &Path) -> String {
    format!(
        "l/{}.erofs",
        hex::encode(Sha256::digest(source.as_os_str().as_encoded_bytes()))
    )
}

/// Puts the root file system of a container into the share and records the undo steps.
///
/// # Errors
/// HostPath for a missing layer, Invalid for unsupported mounts, Io for a failed mount.
pub async fn prepare(
    layers: &SharedBinds,
    share: &Arc<dyn Share>,
    container: &str,
    bundle: &Path,
    mounts: &[Mount],
    undo: &mut Undo,
) -> Result<Rootfs> {
    if !mounts.is_empty() && mounts.iter().all(|mount| mount.type_ == "erofs") {
        return stack(layers, share, mounts, undo).await;
    }
    if let [only] = mounts
        && let Some(files) = snapshot_layers(share, only).await?
    {
        return stack_files(layers, share, &files, undo).await;
    }
    let path = format!("r/{container}");
    let mounted = (share.clone(), path.clone());
    undo.push("root file system", move || async move {
        mounted.0.unbind(&mounted.1).await
    });
    match mounts {
        [] => {
            share
                .bind(
                    &host_path(share, &bundle.join("rootfs")).await?,
                    &path,
                    BindMode::fixed(Access::Full),
                )
                .await?
        }
        [only] if is_bind(only) => {
            let read_only = only.options.iter().any(|option| option == "ro");
            let mode = BindMode::fixed(match read_only {
                true => Access::ReadOnlyTree,
                false => Access::Full,
            });
            share
                .bind(
                    &host_path(share, Path::new(&only.source)).await?,
                    &path,
                    mode,
                )
                .await?;
        }
        [only] => {
            share
                .mount(&only.type_, &only.source, &only.options, &path)
                .await?
        }
        many => {
            return Err(ShimError::Invalid {
                field: "rootfs",
                reason: format!(
                    "unsupported combination of {} mounts of types {:?}: must be one mount or EROFS layers only",
                    many.len(),
                    many.iter()
                        .map(|mount| mount.type_.as_str())
                        .collect::<Vec<_>>()
                ),
            });
        }
    }
    Ok(Rootfs {
        directory: path,
        ..Default::default()
    })
}

async fn stack(
    layers: &SharedBinds,
    share: &Arc<dyn Share>,
    mounts: &[Mount],
    undo: &mut Undo,
) -> Result<Rootfs> {
    let files: Vec<_> = mounts
        .iter()
        .map(|mount| PathBuf::from(&mount.source))
        .collect();
    stack_files(layers, share, &files, undo).await
}

/// Binds layer files, lowest first.
async fn stack_files(
    layers: &SharedBinds,
    share: &Arc<dyn Share>,
    files: &[PathBuf],
    undo: &mut Undo,
) -> Result<Rootfs> {
    if files.len() > MAX_LAYERS {
        return Err(ShimError::Invalid {
            field: "rootfs",
            reason: format!("{} layers exceed the maximum of {MAX_LAYERS}", files.len()),
        });
    }
    let mut stacked = Vec::with_capacity(files.len());
    for file in files {
        let source = host_path(share, file).await?;
        let path = layers.take(share, &source, undo).await?;
        stacked.push(Layer { path });
    }
    Ok(Rootfs {
        layers: stacked,
        ..Default::default()
    })
}

fn is_bind(mount: &Mount) -> bool {
    mount.type_ == "bind"
        || mount
            .options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
}

async fn snapshot_layers(share: &Arc<dyn Share>, mount: &Mount) -> Result<Option<Vec<PathBuf>>> {
    let mount = mount.clone();
    let look = move || Ok(snapshot::erofs_layers(&mount));
    share.host().run_blocking(look).await
}

/// Resolves links of a path of the host.
async fn host_path(share: &Arc<dyn Share>, path: &Path) -> Result<PathBuf> {
    let path = path.to_owned();
    let resolve = move || {
        std::fs::canonicalize(&path).map_err(|error| ShimError::HostPath {
            path,
            required_by: "the root file system".to_owned(),
            reason: error.to_string(),
        })
    };
    share.host().run_blocking(resolve).await
}
