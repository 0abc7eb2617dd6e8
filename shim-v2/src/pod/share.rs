//! [`Share`]: the directory of the host that the guest sees as its share, behind a trait so that tests need no mounts.

use crate::error::Result;
use crate::share::BindMode;
use crate::share::host_namespace::HostNamespace;
use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The host directory that the guest mounts as its share.
#[async_trait]
pub trait Share: Send + Sync {
    /// Binds `source` (a file or directory of the host) at `path` below the share. Fails with AlreadyExists if the path is in
    /// use. A dropped future may leave the mount in place; [`Share::unbind`] removes it.
    async fn bind(&self, source: &Path, path: &str, mode: BindMode) -> Result<()>;
    /// Returns the namespace in which paths of the host are resolved.
    fn host(&self) -> HostNamespace;
    /// Mounts a file system of type `kind` with fstab-style options at the directory `path` below the share.
    async fn mount(&self, kind: &str, source: &str, options: &[String], path: &str) -> Result<()>;
    /// Attaches a detached mount, whose root is a file, at `path` below the share.
    async fn attach(&self, mount: OwnedFd, path: &str) -> Result<()>;
    /// Removes a mount made by bind, mount or attach. Succeeds if it does not exist.
    async fn unbind(&self, path: &str) -> Result<()>;
}
