//! The first task of a containerd: without a CreateSandbox before it, it stands for one. Boots the VM, and answers for
//! the pod's pause container.
//!
//! What the VM is to be comes from [`crate::containerd`]; a sandbox that somebody created is left alone.

use super::Service;
use crate::container::spec;
use crate::containerd::config::ShimConfig;
use crate::containerd::pause::PauseTask;
use crate::containerd::plan::{self, Network};
use crate::containerd::private_net::PrivateNet;
use crate::error::{Result, ShimError};
use crate::sandbox::options::Origin;
use boxlite_sys::sync::Mutex;
use containerd_shim_protos::api::CreateTaskRequest;
use oci_spec::runtime::Spec;
use std::path::{Path, PathBuf};

/// What such a pod has beside its VM. The locks are never held across an await.
#[derive(Default)]
pub(super) struct FirstTask {
    pause: Mutex<Option<PauseTask>>,
    /// Held as long as the shim lives.
    net: Mutex<Option<PrivateNet>>,
}

impl FirstTask {
    /// The pause container, if there is one of this id.
    pub(super) fn pause(&self, id: &str) -> Option<PauseTask> {
        let pause = self.pause.lock();
        pause.clone().filter(|task| task.about().container == id)
    }

    /// Whether there is a pause container.
    pub(super) fn has_pause(&self) -> bool {
        let pause = self.pause.lock();
        pause.is_some()
    }

    /// Forgets the pause container.
    pub(super) fn remove_pause(&self) {
        *self.pause.lock() = None;
    }

    /// The network namespace of a spec: the one it names, an empty one made for it, none for the host's.
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
    /// Boots where `request` is the shim's own first task and nobody described the sandbox; answers the VM's pid if the task
    /// is a pause container, None if it is a container to be created. Should be driven to its end by a task of its own.
    ///
    /// # Errors
    /// A spec nothing can be done with, a VM that does not come up; AlreadyExists for a second pause container.
    pub(super) async fn first_task(&self, request: &CreateTaskRequest) -> Result<Option<u32>> {
        let context = self.sandbox.context();
        let origin = self.sandbox.snapshot().plan.map(|plan| plan.origin);
        if request.id != *context.id || !matches!(origin, None | Some(Origin::Task)) {
            return Ok(None);
        }
        let spec = spec::load(Path::new(&request.bundle))?;
        if origin.is_none() {
            let config = ShimConfig::find()?;
            let netns = self.first.network(&spec)?;
            let plan = plan::of_task(&context.id, &spec, netns, &config).await?;
            self.sandbox.create(plan).await?;
        }
        if self.first.has_pause() {
            return Err(ShimError::AlreadyExists {
                what: "container",
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
