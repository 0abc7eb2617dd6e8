//! [`VmMachine`]: puts a pod's VM together out of vmm, share and net, in the order of [`Machine::boot`].
//!
//! Stand-in until those modules are on main: every boot fails and says so.

use crate::cgroup;
use crate::daemon::PodCgroup;
use crate::error::{Result, ShimError};
use crate::record::Record;
use crate::sandbox::machine::{Booted, Machine};
use crate::sandbox::options::Plan;
use crate::sandbox::undo::Undo;
use async_trait::async_trait;
use boxlite_proto::names;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Gives this process a mount namespace that mounts of the host reach and that lets none of its own out. Single-threaded
/// callers only.
///
/// # Errors
/// Without the right to it.
pub fn enter_mount_namespace() -> std::io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    Ok(())
}

/// See the module.
pub struct VmMachine {
    record: Mutex<Record>,
    cgroup: PodCgroup,
}

impl VmMachine {
    /// A machine that keeps `record` up to date.
    pub fn new(record: Record) -> Self {
        Self {
            record: Mutex::new(record),
            cgroup: PodCgroup::default(),
        }
    }

    /// Writes the record into the bundle.
    ///
    /// # Errors
    /// When the bundle cannot be written.
    pub fn store(&self, bundle: &Path) -> std::io::Result<()> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).store(bundle)
    }

    /// Gives the pod's cgroup up. The VM must be gone.
    pub fn leave_cgroup(&self, limit: Duration) {
        self.cgroup.lock().unwrap_or_else(PoisonError::into_inner).leave(limit);
    }
}

#[async_trait]
impl Machine for VmMachine {
    async fn boot(&self, _id: &str, _bundle: &Path, _plan: &Plan, _undo: &mut Undo) -> Result<Booted> {
        Err(ShimError::Unsupported { what: "booting" })
    }

    fn prepare(&self, bundle: &Path, plan: &Plan) {
        let id = bundle.file_name().unwrap_or_default().to_string_lossy();
        let joined = cgroup::join(&plan.options.cgroup_parent, &id);
        self.record.lock().unwrap_or_else(PoisonError::into_inner).cgroups = joined.made.clone();
        *self.cgroup.lock().unwrap_or_else(PoisonError::into_inner) = joined;
        if let Err(error) = self.store(bundle) {
            tracing::warn!(%error, "the shim's record cannot be written");
        }
    }

    fn console(&self, bundle: &Path) -> PathBuf {
        bundle.join("vm").join(names::CONSOLE_LOG)
    }
}
