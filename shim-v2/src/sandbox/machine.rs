//! [`Machine`]: the trait that boots a VM, so that the driver can be tested without one.
//!
//! [`crate::machine`] implements it.

use super::options::Plan;
use crate::error::Result;
use crate::mount_export::host_mounter::HostMounter;
use crate::net::host::HostPorts;
use crate::pod::Share;
use crate::pod::undo::Undo;
use crate::share::file_server::FileServerWatch;
use crate::share::mirror::MirrorWatch;
use crate::vmm::work_dir::WorkDirWatch;
use async_trait::async_trait;
use boxlite_portal::GuestSession;
use std::path::Path;
use std::sync::Arc;

/// A booted VM whose guest is ready.
pub struct Booted {
    /// Pid of the VMM child on the host.
    pub pid: u32,
    /// Calls into the guest.
    pub session: GuestSession,
    /// Share of the guest.
    pub share: Arc<dyn Share>,
    /// Completes with the reason when the VM ends.
    pub exit: futures::future::BoxFuture<'static, String>,
    /// Kills the VMM without waiting for it.
    pub kill: Arc<dyn Fn() + Send + Sync>,
    /// Port exchange with the host, for pods in the host's network or under containerd. The driver runs it.
    pub host_ports: Option<HostPorts>,
    /// Mounts the guest's exported mounts on the host.
    pub mounter: Option<HostMounter>,
    /// Keeps the file server below its limit of open files; run by the driver.
    pub file_server: Option<FileServerWatch>,
    /// Bounds the files of the VMM; run by the driver.
    pub work_dir: Option<WorkDirWatch>,
    /// Updates the guest's copies of volumes; run by the driver.
    pub mirror: Option<MirrorWatch>,
    /// Facts for SandboxStatus(verbose).
    pub info: Vec<(String, String)>,
}

/// A VM that booted without a pod and waits for one. The machine keeps it for the next [`Machine::boot`].
pub struct WarmVm {
    /// Pid of the VMM child on the host.
    pub pid: u32,
    /// Completes with the reason when the VM ends.
    pub exit: futures::future::BoxFuture<'static, String>,
    /// Facts for SandboxStatus(verbose).
    pub info: Vec<(String, String)>,
}

/// Boots VMs from plans.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Boots a VM as far as it needs no pod: nothing of a pod is in it, and its network is not connected. Steps and `undo` are
    /// those of [`Self::boot`], which takes the VM over with the same list.
    async fn boot_warm(
        &self,
        id: &str,
        bundle: &Path,
        plan: &Plan,
        undo: &mut Undo,
    ) -> Result<WarmVm>;
    /// Builds and boots the VM, or gives a warm one to the pod. Each completed step is in `undo` at once, so that the caller can drop the future at any time
    /// and undo the steps.
    async fn boot(&self, id: &str, bundle: &Path, plan: &Plan, undo: &mut Undo) -> Result<Booted>;
    /// Joins the pod's cgroup, with a warm VM if there is one; called at CreateSandbox.
    fn prepare(&self, id: &str, bundle: &Path, plan: &Plan);
}
