//! [`Share`]: the directory of the host that the guest sees as its share, behind a trait so that tests need no mounts.

use crate::error::Result;
use crate::share::BindMode;
use crate::share::host_namespace::HostNamespace;
use async_trait::async_trait;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The directory that the guest sees as its share.
#[async_trait]
pub trait Share: Send + Sync {
    /// Makes `source` of the host (file or directory) appear at `path` below the share. Both kinds of the same path twice:
    /// AlreadyExists. A dropped future may leave the mount; [`Share::unbind`] takes it away.
    async fn bind(&self, source: &Path, path: &str, mode: BindMode) -> Result<()>;
    /// Returns the namespace in which paths of the host are resolved.
    fn host(&self) -> HostNamespace;
    /// Mounts a file system of the host (`kind`, fstab-style options) at the directory `path` below the share.
    async fn mount(&self, kind: &str, source: &str, options: &[String], path: &str) -> Result<()>;
    /// Puts a file system that is one file and mounted nowhere at `path` below the share.
    async fn attach(&self, mount: OwnedFd, path: &str) -> Result<()>;
    /// Takes away what bind, mount or attach made; succeeds on what is gone.
    async fn unbind(&self, path: &str) -> Result<()>;
}
