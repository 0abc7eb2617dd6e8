//! [`Containers`]: the table of this pod's containers, and [`Container`]: one of them with its exec'd processes.
//!
//! Only looks up and hands over: the life of a process is written by its own task ([`process`]), how a container comes
//! to be is in [`create`]. The locks guard maps and are never held across an await.

pub mod create;
pub mod host_ipc;
mod mapped;
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
use boxlite_sys::sync::Mutex;
use process::Process;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

/// SIGKILL, by number, as the guest takes signals.
const SIGKILL: u32 = 9;

/// A container that exists in the guest.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// The guest it lives in.
    pub guest: Guest,
    /// Its first process.
    pub init: Process,
    execs: Mutex<HashMap<String, Process>>,
    /// Mounts into the share; taken by the one Delete that wins.
    undo: Mutex<Option<Undo>>,
}

impl Container {
    fn execs(&self) -> MutexGuard<'_, HashMap<String, Process>> {
        self.execs.lock()
    }

    /// The process of an exec id; the init process for an empty one.
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
                what: "process",
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
                what: "process",
                id: exec_id.to_owned(),
            }),
            std::collections::hash_map::Entry::Vacant(slot) => Ok(slot.insert(make()).clone()),
        }
    }

    /// Forgets an exec'd process.
    pub fn remove_exec(&self, exec_id: &str) {
        self.execs().remove(exec_id);
    }

    /// All processes, init last: what it started ends before it.
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
    /// Create is under way.
    Making,
    Made(Arc<Container>),
}

/// The table.
pub struct Containers {
    context: Context,
    slots: Mutex<HashMap<String, Slot>>,
    layers: rootfs::SharedBinds,
    export_volumes: Arc<ExportVolumes>,
    blocks: Blocks,
}

impl Containers {
    /// An empty table.
    pub fn new(context: Context) -> Self {
        Self {
            context,
            slots: Mutex::default(),
            layers: rootfs::SharedBinds::default(),
            export_volumes: Arc::default(),
            blocks: Blocks::default(),
        }
    }

    /// Returns the volumes below which containers may export mounts to the host.
    pub fn export_volumes(&self) -> &Arc<ExportVolumes> {
        &self.export_volumes
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock()
    }

    /// The container of an id.
    ///
    /// # Errors
    /// NotFound, also while it is being made.
    pub fn get(&self, id: &str) -> Result<Arc<Container>> {
        match self.slots().get(id) {
            Some(Slot::Made(container)) => Ok(container.clone()),
            Some(Slot::Making) | None => Err(ShimError::NotFound {
                what: "container",
                id: id.to_owned(),
            }),
        }
    }

    fn all(&self) -> Vec<Arc<Container>> {
        self.slots()
            .values()
            .filter_map(|slot| match slot {
                Slot::Made(container) => Some(container.clone()),
                Slot::Making => None,
            })
            .collect()
    }

    /// How many there are, made or being made.
    pub fn len(&self) -> usize {
        self.slots().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// SIGKILL to everything. Failures are logged: what has ended has ended.
    pub async fn kill_all(&self) {
        let kills = self.all().into_iter().map(|container| async move {
            if let Err(error) = container.init.kill(SIGKILL, true).await {
                tracing::debug!(container = container.id, %error, "not killed");
            }
        });
        futures::future::join_all(kills).await;
    }

    /// Waits until no process runs any more, output drained. False: some outlived `limit`.
    pub async fn settled(&self, limit: Duration) -> bool {
        let processes: Vec<Process> = self
            .all()
            .iter()
            .flat_map(|container| container.processes())
            .collect();
        let all = async {
            for process in processes {
                process.settled().await;
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }

    /// Ends the tasks of all processes, whose VM is gone: containers that nobody deleted would hold the shim back.
    pub async fn close_all(&self) {
        for container in self.all() {
            for process in container.processes() {
                process.close().await;
            }
        }
    }

    /// Removes a container whose init has ended, or never started, with its execs and mounts. Answers its end.
    /// Runs to its end even when the caller goes away only if the caller spawned it; see the service.
    ///
    /// # Errors
    /// NotFound, WrongState while it runs, the guest's refusal.
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
