//! [`PodContext`]: state shared by the containers of a pod.

use super::error::ContainerError;
use super::events::Events;
use super::launcher::Launcher;
use super::userns::UserNamespace;
use crate::mount_export::ExportList;
use crate::spawner::SpawnError;
use crate::spawner::wire::{IdMap, Message, Request};
use crate::storage::layers::Layers;
use crate::storage::mirror::VolumeMirrors;
use std::sync::Arc;

/// The process that holds the namespaces shared by containers.
#[derive(Debug)]
struct Pause {
    pid: i32,
    user_namespace: Option<UserNamespace>,
}

/// State shared by the containers of a pod.
#[derive(Debug)]
pub(crate) struct PodContext {
    pub launcher: Launcher,
    pub layers: Layers,
    /// Copies of volumes that the host updates atomically.
    pub mirrors: VolumeMirrors,
    pub events: Events,
    /// Mounts of containers that are exported to the host.
    pub exports: Arc<ExportList>,
    /// Process that holds the shared namespaces, once a container needed it.
    pause: tokio::sync::Mutex<Option<Pause>>,
}

impl PodContext {
    /// Creates the context of a pod without containers.
    pub(crate) fn new(launcher: Launcher) -> Self {
        Self {
            launcher,
            layers: Layers::default(),
            mirrors: VolumeMirrors::default(),
            events: Events::default(),
            exports: Arc::default(),
            pause: tokio::sync::Mutex::default(),
        }
    }

    /// Returns the process that holds the pod's shared PID namespace, creating it on first use. The process lives in
    /// the pod's user namespace if `map` is given; all containers of a pod must have the same mapping.
    pub(crate) async fn pause_pid(&self, map: Option<IdMap>) -> Result<i32, ContainerError> {
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
        let reply = self.launcher.spawner.request(&Request::Pause(map), &[])?;
        let pid = match reply.next().await? {
            Some((Message::Created { pid }, _)) => pid,
            Some((Message::Failed(failure), _)) => return Err(SpawnError::Refused(failure).into()),
            _ => return Err(SpawnError::Silent.into()),
        };
        if map.is_some() {
            // The network belongs to the VM's user namespace, in which the pod's root has no privileges, but a pod
            // may bind low ports.
            crate::system::set_sysctl("net.ipv4.ip_unprivileged_port_start", "0")?;
        }
        let user_namespace = map
            .map(|map| {
                let file = std::fs::File::open(format!("/proc/{pid}/ns/user"))?;
                let file = Arc::new(file);
                Ok(UserNamespace { map, pid, file })
            })
            .transpose()
            .map_err(ContainerError::step("failed to open the user namespace"))?;
        *pause = Some(Pause {
            pid,
            user_namespace,
        });
        Ok(pid)
    }

    /// Returns the pod's user namespace, creating it on first use.
    pub(crate) async fn user_namespace(&self, map: IdMap) -> Result<UserNamespace, ContainerError> {
        self.pause_pid(Some(map)).await?;
        let pause = self.pause.lock().await;
        let present = pause
            .as_ref()
            .and_then(|pause| pause.user_namespace.clone());
        present.ok_or(SpawnError::Silent.into())
    }
}
