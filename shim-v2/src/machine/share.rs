//! [`VmShare`]: runs the blocking calls of [`PodShare`] on blocking threads and converts its errors.

use crate::error::{Result, ShimError};
use crate::pod::Share;
use crate::share::host_namespace::HostNamespace;
use crate::share::{BindMode, PodShare, ShareError};
use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

/// The pod's share, as containers use it.
pub(crate) struct VmShare(pub PodShare);

#[async_trait]
impl Share for VmShare {
    async fn bind(&self, source: &Path, path: &str, mode: BindMode) -> Result<()> {
        let (share, source, path) = (self.0.clone(), source.to_owned(), path.to_owned());
        blocking("bind into the share", move || {
            share.bind(&source, &path, mode)
        })
        .await
    }

    fn host(&self) -> HostNamespace {
        self.0.host().clone()
    }

    async fn mount(&self, kind: &str, source: &str, options: &[String], path: &str) -> Result<()> {
        let (share, path) = (self.0.clone(), path.to_owned());
        let (kind, source, options) = (kind.to_owned(), source.to_owned(), options.to_vec());
        blocking("mount into the share", move || {
            share.mount(&kind, &source, &options, &path)
        })
        .await
    }

    async fn attach(&self, mount: OwnedFd, path: &str) -> Result<()> {
        let (share, path) = (self.0.clone(), path.to_owned());
        blocking("attach to the share", move || share.attach(&mount, &path)).await
    }

    async fn unbind(&self, path: &str) -> Result<()> {
        let (share, path) = (self.0.clone(), path.to_owned());
        blocking("remove from the share", move || share.unbind(&path)).await
    }
}

/// Runs `work` on a blocking thread. Dropping the future does not stop it.
pub(super) async fn blocking<T, E>(
    step: &'static str,
    work: impl FnOnce() -> std::result::Result<T, E> + Send + 'static,
) -> Result<T>
where
    T: Send + 'static,
    E: Into<MachineError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| error.into().into_shim(step)),
        Err(_) => Err(ShimError::Ending),
    }
}

/// Errors of the VM's parts before their conversion.
pub(super) enum MachineError {
    Share(ShareError),
    Other(Arc<dyn std::error::Error + Send + Sync>),
}

impl MachineError {
    fn into_shim(self, step: &'static str) -> ShimError {
        match self {
            Self::Share(ShareError::Source { path, source }) => ShimError::HostPath {
                path,
                required_by: "the share".to_owned(),
                reason: source.to_string(),
            },
            Self::Share(ShareError::Private { path }) => ShimError::HostPath {
                path,
                required_by: "a mount with propagation HostToContainer".to_owned(),
                reason: "it is on a private mount, so later mounts of the host cannot propagate"
                    .to_owned(),
            },
            Self::Share(ShareError::Map { path, source }) => ShimError::HostPath {
                path,
                required_by: "a pod with a user namespace".to_owned(),
                reason: format!("its owners cannot be mapped for the user namespace: {source}"),
            },
            Self::Share(ShareError::Occupied { path }) => ShimError::AlreadyExists {
                kind: "path in the share",
                id: path,
            },
            Self::Share(error) => ShimError::Boot {
                step,
                source: Arc::new(error),
            },
            Self::Other(source) => ShimError::Boot { step, source },
        }
    }
}

impl From<ShareError> for MachineError {
    fn from(error: ShareError) -> Self {
        Self::Share(error)
    }
}

impl From<crate::net::NetError> for MachineError {
    fn from(error: crate::net::NetError) -> Self {
        Self::Other(Arc::new(error))
    }
}

impl From<super::vmm_user::UserError> for MachineError {
    fn from(error: super::vmm_user::UserError) -> Self {
        Self::Other(Arc::new(error))
    }
}

impl From<crate::vmm::supervisor::SpawnError> for MachineError {
    fn from(error: crate::vmm::supervisor::SpawnError) -> Self {
        Self::Other(Arc::new(error))
    }
}
