//! [`Pod`]: the containers of the pod by id.
//!
//! The map is locked for lookups only. A container is created once per id, in a separate task, whose result all
//! callers with that id share; a caller that leaves does not interrupt the creation.

use super::context::PodContext;
use super::error::ContainerError;
use super::launcher::{Launcher, blocking};
use super::{Container, create};
use boxlite_proto::boxlite::v1::{ContainerInitRequest, PidMode};
use boxlite_sys::sync::Mutex;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use rustix::process::Signal;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// Maximum number of containers in a pod.
const MAX_CONTAINERS: usize = 256;
/// Maximum length of a container id; the host uses 64 hex digits.
const MAX_ID_BYTES: usize = 128;
/// Timeout of the exit of a killed container's init process.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

/// A container that is being created or exists.
type Slot = Shared<BoxFuture<'static, Result<Arc<Container>, Arc<ContainerError>>>>;

/// The pod's containers and their shared state.
#[derive(Debug)]
pub(crate) struct Pod {
    pub context: Arc<PodContext>,
    containers: Mutex<HashMap<String, Slot>>,
}

impl Pod {
    /// Creates a pod without containers.
    pub(crate) fn new(launcher: Launcher) -> Self {
        Self {
            context: Arc::new(PodContext::new(launcher)),
            containers: Mutex::default(),
        }
    }

    /// Returns the container with that id, waiting while it is being created.
    pub(crate) async fn get(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let slot = self.lock().get(id).cloned();
        match slot {
            Some(slot) => Ok(slot.await?),
            None => Err(ContainerError::NotFound {
                what: "container",
                id: id.to_owned(),
            }),
        }
    }

    /// Returns all containers whose creation is complete.
    pub(crate) fn list(&self) -> Vec<Arc<Container>> {
        self.lock()
            .values()
            .filter_map(|slot| slot.peek()?.as_ref().ok().cloned())
            .collect()
    }

    /// Creates a container, or returns the one with its id.
    ///
    /// If the future is dropped, the container is still created; a repeated call returns it.
    pub(crate) async fn init(
        self: &Arc<Self>,
        request: ContainerInitRequest,
    ) -> Result<Arc<Container>, ContainerError> {
        let id = request.container_id.clone();
        check_id(&id)?;
        let slot = {
            let mut containers = self.lock();
            match containers.get(&id) {
                Some(slot) => slot.clone(),
                None if containers.len() >= MAX_CONTAINERS => {
                    return Err(ContainerError::Limit {
                        what: "containers in the pod",
                        limit: MAX_CONTAINERS,
                    });
                }
                None => {
                    let slot = self.begin(request);
                    containers.insert(id.clone(), slot.clone());
                    slot
                }
            }
        };
        match slot.await {
            Ok(container) => Ok(container),
            Err(error) => {
                let mut containers = self.lock();
                if containers
                    .get(&id)
                    .and_then(Shared::peek)
                    .is_some_and(Result::is_err)
                {
                    containers.remove(&id);
                }
                Err(error.into())
            }
        }
    }

    fn begin(self: &Arc<Self>, request: ContainerInitRequest) -> Slot {
        let tasks = &self.context.launcher.tasks;
        let pod = Arc::clone(self);
        let task = tasks.spawn(async move {
            let target = match request.pid_mode() {
                PidMode::Target => Some(pod.get(&request.pid_target).await?),
                _ => None,
            };
            create::create(Arc::clone(&pod.context), target, request).await
        });
        let slot = async move {
            match task.await {
                Ok(result) => result.map_err(Arc::new),
                Err(error) => Err(Arc::new(ContainerError::Step {
                    step: "creation task panicked",
                    source: io::Error::other(error),
                })),
            }
        }
        .boxed()
        .shared();
        // The result must be awaited even if all callers have left.
        tasks.spawn(slot.clone().map(drop));
        slot
    }

    /// Removes a container that has ended; with `force`, kills it first. Succeeds if it does not exist.
    ///
    /// If the future is dropped, the container is removed completely or not at all; parts of its state may already be
    /// gone.
    pub(crate) async fn delete(
        self: &Arc<Self>,
        id: &str,
        force: bool,
    ) -> Result<(), ContainerError> {
        let container = match self.get(id).await {
            Ok(container) => container,
            // Removed before, or never created.
            Err(_) => {
                self.lock().remove(id);
                return Ok(());
            }
        };
        if container.init.exit().is_none() {
            if !force {
                return Err(container.wrong_state("delete"));
            }
            container.cgroup.kill()?;
            if tokio::time::timeout(DEATH_TIMEOUT, container.init.wait())
                .await
                .is_err()
            {
                return Err(container.wrong_state("delete it: SIGKILL did not end it in time"));
            }
        }
        let context = Arc::clone(&self.context);
        blocking(move || {
            container.tear_down(&context);
            Ok(())
        })
        .await?;
        self.lock().remove(id);
        Ok(())
    }

    /// Stops all containers: sends SIGTERM, waits up to `grace`, then kills them.
    pub(crate) async fn stop_all(&self, grace: Duration) {
        let containers = self.list();
        let ended = async {
            for container in &containers {
                container.init.wait().await;
            }
        };
        if !grace.is_zero() {
            for container in &containers {
                let _ = container.kill(Signal::TERM.as_raw().unsigned_abs(), false);
            }
            if tokio::time::timeout(grace, ended).await.is_ok() {
                return;
            }
        }
        for container in &containers {
            let _ = container.cgroup.kill();
        }
        for container in &containers {
            let _ = tokio::time::timeout(DEATH_TIMEOUT, container.init.wait()).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock()
    }
}

/// Checks an id, which is used as the name of a directory and of a cgroup.
fn check_id(id: &str) -> Result<(), ContainerError> {
    let plain = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    // A leading dot is hidden or names a parent; all cgroup files have a dot in their name.
    let taken = id.starts_with('.')
        || id.contains("..")
        || id.starts_with("cgroup.")
        || id.starts_with("memory.");
    if id.is_empty() || id.len() > MAX_ID_BYTES || !plain || taken {
        return Err(ContainerError::Invalid {
            field: "container_id",
            reason: format!("{id:?} is not a valid id"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_id_accepts_only_plain_names() {
        for good in ["a", "0123abcdef", "web_1.x-y"] {
            assert!(check_id(good).is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "a/b", "a..b", "cgroup.procs", "a b", "é"] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
        assert!(check_id(&"a".repeat(MAX_ID_BYTES + 1)).is_err());
    }
}
