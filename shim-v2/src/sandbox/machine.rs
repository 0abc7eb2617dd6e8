//! [`Machine`]: how a VM comes to be, behind a trait so that the driver can be tested without one.
//!
//! The real one is [`crate::machine`]; nothing else in sandbox/, container/ or logs/ knows a VMM, a tap or a mount.

use super::options::Plan;
use crate::error::Result;
use crate::mount_export::host_mounter::HostMounter;
use crate::net::host::HostPorts;
use crate::pod::Share;
use crate::pod::undo::Undo;
use crate::share::file_server::FileServerWatch;
use async_trait::async_trait;
use boxlite_portal::GuestSession;
use std::path::Path;
use std::sync::Arc;

/// A VM whose guest is ready.
pub struct Booted {
    /// Pid of the vmm child on the host.
    pub pid: u32,
    /// Calls into the guest.
    pub session: GuestSession,
    /// Its share.
    pub share: Arc<dyn Share>,
    /// Completes with words when the VM ends.
    pub exit: futures::future::BoxFuture<'static, String>,
    /// Ends the VM by force; returns at once.
    pub kill: Arc<dyn Fn() + Send + Sync>,
    /// For a pod in the host's network, or under containerd: the exchange of ports, which the driver runs.
    pub host_ports: Option<HostPorts>,
    /// Mounts the guest's exported mounts on the host.
    pub mounter: Option<HostMounter>,
    /// Keeps the file server below its limit of open files; run by the driver.
    pub file_server: Option<FileServerWatch>,
    /// Facts for SandboxStatus(verbose).
    pub info: Vec<(String, String)>,
}

/// Makes VMs out of plans.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Builds and boots. Everything done is in `undo` as soon as it is done, so that the caller can drop the future at
    /// any time and take it back.
    async fn boot(&self, id: &str, bundle: &Path, plan: &Plan, undo: &mut Undo) -> Result<Booted>;
    /// What happens at CreateSandbox already: joining the pod's cgroup.
    fn prepare(&self, id: &str, bundle: &Path, plan: &Plan);
}
