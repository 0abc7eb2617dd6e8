//! [`Containers`]: the table of this pod's containers, and [`Container`]: one container with its exec'd processes.
//!
//! The state of each process belongs to its task ([`process`]); [`create`] builds containers. The locks here guard maps
//! and are not held across an await.

pub mod create;
pub mod host_ipc;
mod mapped;
mod memory;
pub mod process;
pub mod rootfs;
pub mod snapshot;
pub mod spec;
pub mod stats;
mod volume;

use crate::blocks::Blocks;
use crate::error::{Result, ShimError};
use crate::mount_export::volumes::ExportVolumes;
use crate::pod::undo::Undo;
use crate::pod::{Context, Guest};
use crate::share::mirror::MirroredVolumes;
use crate::share::writers::WriterRegistry;
use boxlite_sys::sync::Mutex;
use process::Process;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// SIGKILL as a signal number of the guest protocol.
const SIGKILL: u32 = 9;

/// A container that exists in the guest.
pub struct Container {
    /// Container id.
    pub id: String,
    /// Bundle directory on the host.
    pub bundle: PathBuf,
    /// Guest that runs the container.
    pub guest: Guest,
    /// Init process.
    pub init: Process,
    execs: Mutex<HashMap<String, Process>>,
    /// Undo steps of the creation; the first Delete takes them.
    undo: Mutex<Option<Undo>>,
}

impl Container {
    fn execs(&self) -> MutexGuard<'_, HashMap<String, Process>> {
        self.execs.lock()
    }

    /// Returns the process of an exec id, or the init process for an empty id.
    ///
    /// # Errors
    /// NotFound.
    pub fn process(&self, exec_id: &str) -> Result<Process> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| ShimError::NotFound {
                kind: "process",
                id: exec_id.to_owned(),
            })
    }

    /// Registers an exec'd process.
    ///
    /// # Errors
    /// AlreadyExists.
    pub fn add_exec(&self, exec_id: &str, make: impl FnOnce() -> Process) -> Result<Process> {
        match self.execs().entry(exec_id.to_owned()) {
            std::collections::hash_map::Entry::Occupied(_) => Err(ShimError::AlreadyExists {
                kind: "process",
                id: exec_id.to_owned(),
            }),
            std::collections::hash_map::Entry::Vacant(slot) => Ok(slot.insert(make()).clone()),
        }
    }

    /// Removes an exec'd process from the table.
    pub fn remove_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// Returns all processes with init last, so that its children are handled before it.
    fn processes(&self) -> Vec<Process> {
        let mut all: Vec<Process> = self.execs().values().cloned().collect();
        all.push(self.init.clone());
        all
    }

    fn take_undo(&self) -> Option<Undo> {
        self.undo.lock().take()
    }
}

enum Slot {
    /// Create is in progress.
    Creating,
    Created(Arc<Container>),
}

/// The pod's containers by id.
pub struct Containers {
    context: Context,
    slots: Mutex<HashMap<String, Slot>>,
    layers: rootfs::SharedBinds,
    export_volumes: Arc<ExportVolumes>,
    mirrored: Arc<MirroredVolumes>,
    writers: Arc<WriterRegistry>,
    blocks: Blocks,
}

impl Containers {
    /// Creates an empty table.
    pub fn new(context: Context) -> Self {
        Self {
            context,
            slots: Mutex::default(),
            layers: rootfs::SharedBinds::default(),
            export_volumes: Arc::default(),
            mirrored: Arc::default(),
            writers: Arc::default(),
            blocks: Blocks::default(),
        }
    }

    /// Returns the volumes below which containers may export mounts to the host.
    pub fn export_volumes(&self) -> &Arc<ExportVolumes> {
        &self.export_volumes
    }

    /// Returns the volumes that the guest has copied.
    pub fn mirrored(&self) -> &Arc<MirroredVolumes> {
        &self.mirrored
    }

    /// Returns the record of the directories that containers write to.
    pub fn writers(&self) -> &WriterRegistry {
        &self.writers
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock()
    }

    /// Returns the container of an id.
    ///
    /// # Errors
    /// NotFound, also while the container is being created.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.slots().get(id) {
            Some(Slot::Created(container)) => Ok(container.clone()),
            Some(Slot::Creating) | None => Err(ShimError::NotFound {
                kind: "container",
                id: id.to_owned(),
            }),
        }
    }

    fn all(&self) -> Vec<Arc<Container>> {
        self.slots()
            .values()
            .filter_map(|slot| match slot {
                Slot::Created(container) => Some(container.clone()),
                Slot::Creating => None,
            })
            .collect()
    }

    /// Returns the number of containers, including those being created.
    pub fn len(&self) -> usize {
        self.slots().len()
    }

    /// Returns whether the table is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sends SIGKILL to all containers. Failures are only logged, since a container may have ended already.
    pub async fn kill_all(&self) {
        let kills = self.all().into_iter().map(|container| async move {
            if let Err(error) = container.init.kill(SIGKILL, true).await {
                tracing::debug!(container = container.id, %error, "failed to kill container");
            }
        });
        futures::future::join_all(kills).await;
    }

    /// Waits until no process runs and all output is drained. Returns false if that takes longer than `timeout`.
    pub async fn wait_stopped(&self, timeout: Duration) -> bool {
        let processes: Vec<Process> = self
            .all()
            .iter()
            .flat_map(|container| container.processes())
            .collect();
        let all = async {
            for process in processes {
                process.wait_stopped().await;
            }
        };
        tokio::time::timeout(timeout, all).await.is_ok()
    }

    /// Ends the tasks of all processes after the VM has ended. Containers that were not deleted would delay the shim's exit.
    pub async fn close_all(&self) {
        for container in self.all() {
            for process in container.processes() {
                process.close().await;
            }
        }
    }

    /// Removes a container that is not running, with its execs and mounts, and returns its final state. The caller spawns
    /// the future so that it completes even if the client disconnects.
    ///
    /// # Errors
    /// NotFound, WrongState while it runs, or the guest's error.
    pub async fn delete(&self, id: &str) -> Result<process::State> {
        let container = self.get(id)?;
        let state = container.init.delete().await?;
        for process in container.processes() {
            process.close().await;
        }
        if let Some(undo) = container.take_undo() {
            undo.run().await;
        }
        self.slots().remove(id);
        Ok(state)
    }
}
