//! [`Pod`]: the containers by id, and what they share.
//!
//! The map's lock is held for lookups only. Making a container happens once per id in a task of its own, whose result
//! every caller with that id gets; so a caller that gives up leaves nothing half made.

use super::events::Events;
use super::userns::UserNamespace;
use super::{Container, ContainerError, create};
use crate::agent::Agent;
use crate::shown::Shown;
use crate::spawner::SpawnError;
use crate::spawner::wire::{IdMap, Message, Request};
use crate::storage::layers::Layers;
use boxlite_proto::boxlite::v1::ContainerInitRequest;
use boxlite_sys::sync::Mutex;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use rustix::process::Signal;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// Containers of a pod.
const CONTAINER_LIMIT: usize = 256;
/// Longest container id; the host's are 64 hex digits.
const ID_LIMIT: usize = 128;
/// How long a killed container's init process may take to be seen dead.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

/// A container being made, or made.
type Slot = Shared<BoxFuture<'static, Result<Arc<Container>, Arc<ContainerError>>>>;

/// Holds the namespaces that containers share.
#[derive(Debug)]
struct Pause {
    pid: i32,
    user_namespace: Option<UserNamespace>,
}

/// The pod.
#[derive(Debug, Default)]
pub struct Pod {
    containers: Mutex<HashMap<String, Slot>>,
    pub layers: Layers,
    pub events: Events,
    /// Mounts of containers that the host shows, too.
    pub shown: Arc<Shown>,
    /// The process that holds the shared namespaces, once one was asked for.
    pause: tokio::sync::Mutex<Option<Pause>>,
}

impl Pod {
    /// The container with that id, waiting while it is being made.
    pub async fn get(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let slot = self.lock().get(id).cloned();
        match slot {
            Some(slot) => Ok(slot.await?),
            None => Err(ContainerError::NotFound {
                what: "container",
                id: id.to_owned(),
            }),
        }
    }

    /// All that are made.
    pub fn list(&self) -> Vec<Arc<Container>> {
        self.lock()
            .values()
            .filter_map(|slot| slot.peek()?.as_ref().ok().cloned())
            .collect()
    }

    /// Makes a container, or answers the one with its id.
    ///
    /// Dropping the future leaves it being made; a repeated call gets it.
    pub async fn init(
        self: &Arc<Self>,
        agent: &Arc<Agent>,
        request: ContainerInitRequest,
    ) -> Result<Arc<Container>, ContainerError> {
        let id = request.container_id.clone();
        check_id(&id)?;
        let slot = {
            let mut containers = self.lock();
            match containers.get(&id) {
                Some(slot) => slot.clone(),
                None if containers.len() >= CONTAINER_LIMIT => {
                    return Err(ContainerError::Limit {
                        what: "containers of a pod",
                        limit: CONTAINER_LIMIT,
                    });
                }
                None => {
                    let slot = self.begin(agent, request);
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

    fn begin(self: &Arc<Self>, agent: &Arc<Agent>, request: ContainerInitRequest) -> Slot {
        let task = agent
            .tasks
            .spawn(create::create(Arc::clone(agent), Arc::clone(self), request));
        let slot = async move {
            match task.await {
                Ok(result) => result.map_err(Arc::new),
                Err(error) => Err(Arc::new(ContainerError::Step {
                    step: "create",
                    source: io::Error::other(error),
                })),
            }
        }
        .boxed()
        .shared();
        // Somebody must take the result even when all callers have gone.
        agent.tasks.spawn(slot.clone().map(drop));
        slot
    }

    /// Removes a container that has ended; with `force` kills it first. Succeeds on what is gone.
    ///
    /// Dropping the future leaves the container there or gone, and what of it was taken down is.
    pub async fn delete(self: &Arc<Self>, id: &str, force: bool) -> Result<(), ContainerError> {
        let container = match self.get(id).await {
            Ok(container) => container,
            // Gone, or never made.
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
                return Err(container.wrong_state("delete: it doesn't die"));
            }
        }
        let pod = Arc::clone(self);
        create::blocking(move || {
            container.take_down(&pod);
            Ok(())
        })
        .await?;
        self.lock().remove(id);
        Ok(())
    }

    /// The process that holds the pod's shared PID namespace, made when first asked for. It lives in the pod's user
    /// namespace if `map` asks for one; all containers of a pod must ask for the same.
    pub async fn pause_pid(
        &self,
        agent: &Agent,
        map: Option<IdMap>,
    ) -> Result<i32, ContainerError> {
        let mut pause = self.pause.lock().await;
        if let Some(pause) = &*pause {
            let present = pause.user_namespace.as_ref().map(|present| present.map);
            return if present == map {
                Ok(pause.pid)
            } else {
                Err(ContainerError::Invalid {
                    field: "linux.uidMappings",
                    reason: "differs from that of the pod's other containers".to_owned(),
                })
            };
        }
        let reply = agent.spawner.request(&Request::Pause(map), &[])?;
        let pid = match reply.next().await? {
            Some((Message::Created { pid }, _)) => pid,
            Some((Message::Failed(failure), _)) => return Err(SpawnError::Refused(failure).into()),
            _ => return Err(SpawnError::Silent.into()),
        };
        if map.is_some() {
            // The network is the VM's, which the pod's root has no rights to; a pod may bind its low ports all the same.
            crate::system::set_sysctl("net.ipv4.ip_unprivileged_port_start", "0")?;
        }
        let user_namespace = map
            .map(|map| {
                let file = std::fs::File::open(format!("/proc/{pid}/ns/user"))?;
                let file = Arc::new(file);
                Ok(UserNamespace { map, pid, file })
            })
            .transpose()
            .map_err(ContainerError::step("open the user namespace"))?;
        *pause = Some(Pause {
            pid,
            user_namespace,
        });
        Ok(pid)
    }

    /// The pod's user namespace, made when first asked for.
    pub async fn user_namespace(
        &self,
        agent: &Agent,
        map: IdMap,
    ) -> Result<UserNamespace, ContainerError> {
        self.pause_pid(agent, Some(map)).await?;
        let pause = self.pause.lock().await;
        let present = pause
            .as_ref()
            .and_then(|pause| pause.user_namespace.clone());
        present.ok_or(SpawnError::Silent.into())
    }

    /// Ends all containers: asks them, waits up to `grace`, kills.
    pub async fn stop_all(&self, grace: Duration) {
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

/// An id becomes a directory and a cgroup.
fn check_id(id: &str) -> Result<(), ContainerError> {
    let plain = id
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    // A dot in front would hide it or be a parent; cgroup file names all have one inside.
    let taken = id.starts_with('.')
        || id.contains("..")
        || id.starts_with("cgroup.")
        || id.starts_with("memory.");
    if id.is_empty() || id.len() > ID_LIMIT || !plain || taken {
        return Err(ContainerError::Invalid {
            field: "container_id",
            reason: format!("{id:?} is no id"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_names() {
        for good in ["a", "0123abcdef", "web_1.x-y"] {
            assert!(check_id(good).is_ok(), "{good:?}");
        }
        for bad in ["", ".", "..", "a/b", "a..b", "cgroup.procs", "a b", "é"] {
            assert!(check_id(bad).is_err(), "{bad:?}");
        }
        assert!(check_id(&"a".repeat(ID_LIMIT + 1)).is_err());
    }
}
