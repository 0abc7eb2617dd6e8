//! The first Task.Create of a containerd that does not call CreateSandbox: creates and boots the sandbox, and represents the
//! pod's pause container.
//!
//! [`crate::containerd`] builds the plan. A sandbox made by CreateSandbox is not touched.

use super::Service;
use crate::container::spec;
use crate::containerd::config::ShimConfig;
use crate::containerd::pause::PauseTask;
use crate::containerd::plan::{self, Network};
use crate::containerd::private_net::PrivateNet;
use crate::error::{Result, ShimError};
use crate::sandbox::options::SandboxOwner;
use boxlite_sys::sync::Mutex;
use containerd_shim_protos::api::CreateTaskRequest;
use oci_spec::runtime::Spec;
use std::path::{Path, PathBuf};

/// State of a pod without CreateSandbox, besides its VM. The locks are not held across an await.
#[derive(Default)]
pub(super) struct FirstTask {
    pause: Mutex<Option<PauseTask>>,
    /// Kept until the shim ends.
    net: Mutex<Option<PrivateNet>>,
}

impl FirstTask {
    /// Returns the pause container if it has this id.
    pub(super) fn pause(&self, id: &str) -> Option<PauseTask> {
        let pause = self.pause.lock();
        pause.clone().filter(|task| task.config().container == id)
    }

    /// Returns whether the pod has a pause container.
    pub(super) fn has_pause(&self) -> bool {
        let pause = self.pause.lock();
        pause.is_some()
    }

    /// Removes the pause container.
    pub(super) fn remove_pause(&self) {
        *self.pause.lock() = None;
    }

    /// Returns the network namespace of a spec: the one that it names, or a new empty one; None for the host's network.
    fn network(&self, spec: &Spec) -> Result<Option<PathBuf>> {
        match plan::network(spec) {
            Network::Host => Ok(None),
            Network::Namespace(path) => Ok(Some(path)),
            Network::Private => {
                let made = PrivateNet::create()?;
                let path = made.path();
                *self.net.lock() = Some(made);
                Ok(Some(path))
            }
        }
    }
}

impl Service {
    /// Boots the VM if `request` is this shim's first task and no sandbox was created. Returns the VM's pid if the task is a
    /// pause container, None if the container is still to be created. The caller must spawn the future.
    ///
    /// # Errors
    /// An invalid spec or a failed boot; AlreadyExists for a second pause container.
    pub(super) async fn first_task(&self, request: &CreateTaskRequest) -> Result<Option<u32>> {
        let context = self.sandbox.context();
        let owner = self.sandbox.snapshot().plan.map(|plan| plan.owner);
        if request.id != *context.id || !matches!(owner, None | Some(SandboxOwner::Task)) {
            return Ok(None);
        }
        let spec = spec::load(Path::new(&request.bundle))?;
        if owner.is_none() {
            let config = ShimConfig::find()?;
            let netns = match plan::has_passt(&spec, &config) {
                true => None,
                false => self.first.network(&spec)?,
            };
            let plan = plan::of_task(&context.id, &spec, netns, &config).await?;
            self.sandbox.create(plan).await?;
        }
        if self.first.has_pause() {
            return Err(ShimError::AlreadyExists {
                kind: "container",
                id: request.id.clone(),
            });
        }
        let pid = self.sandbox.start().await?.pid;
        if !plan::is_pause(&spec) {
            return Ok(None);
        }
        let task = PauseTask::create(&self.sandbox, request);
        *self.first.pause.lock() = Some(task);
        Ok(Some(pid))
    }
}
